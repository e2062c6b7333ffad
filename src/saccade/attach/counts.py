"""What one attention layer computed and looked through: noted for the record, and counted when somebody asks."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from saccade.attach.store import Bucket
from saccade.core.record import LayerRecord
from saccade.core.selection import Selection, causal_mask
from saccade.core.site import Stage


class Counts:
    """Pairs and keys of one layer. `record` gives the layer's part of the run's record."""

    def __init__(self, record: Callable[[], LayerRecord]):
        self._record = record
        self.pending: list[Selection] = []  # selections of the prefill
        self.decoded: Tensor | None = None  # pairs of later tokens, summed where they are
        self.visited: int | Tensor | None = None  # keys that searches looked at, likewise

    def clear(self) -> None:
        """Forget what was not counted yet."""
        self.pending.clear()
        self.decoded = self.visited = None

    def later(self, q: Tensor, selection: Selection) -> None:
        """A selection of later tokens; the device sums the pairs, and is not asked before somebody asks."""
        self.add(selection.count().expand(*q.shape[:2]).sum())
        self._note("decode", 0.0, selection.dense_pairs * q[..., 0, 0].numel())

    def add(self, pairs: Tensor) -> None:
        """Pairs of later tokens that the device has summed."""
        self.decoded = pairs if self.decoded is None else self.decoded + pairs

    def searched(self, visited: int | Tensor, there: int) -> None:
        """What `Site.searched` does."""
        self.visited = visited if self.visited is None else self.visited + visited
        self._record().keys_searched += there

    def dense(
        self, seen: list[int], rows: Bucket, q: Float[Tensor, "r s q d"], stage: Stage, visible: Tensor | None
    ) -> None:
        """Dense attention over what is stored, beside what a dense cache would have computed: over every token seen, of
        each row."""
        r, s, n, _ = q.shape
        causal = (sum(seen) * n - r * n * (n - 1) / 2) * s
        if visible is None:
            pairs = r * s * (rows.length * n - n * (n - 1) / 2)
        else:
            pairs = float((visible & causal_mask(n, rows.length, visible.device)).sum()) * s
        self._note(stage, pairs, causal)

    def settle(self) -> None:
        """Count the selections of the prefill; put off until asked, since it can cost as much as choosing them. Then
        note what the device has counted of later tokens.
        """
        for selection in self.pending:
            share = float(selection.density().mean())
            self._note("prefill", share * selection.dense_pairs, selection.dense_pairs)
        self.pending.clear()
        if self.decoded is not None:
            self._note("decode", float(self.decoded), 0.0)
            self.decoded = None
        if self.visited is not None:
            self._record().keys_visited += int(self.visited)
            self.visited = None

    def _note(self, stage: Stage, pairs: float, causal: float) -> None:
        record = self._record()
        record.pairs[stage] += pairs
        record.pairs_causal[stage] += causal
