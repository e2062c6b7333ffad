"""Where a method is asked: which layer, which stage, how many tokens. Set by the attachment, never guessed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade.core.budget import FULL, Budget
from saccade.core.shard import WHOLE, Shard

if TYPE_CHECKING:
    from saccade.core.selection import Selection

Stage = Literal["prefill", "decode"]
State = dict[str, Tensor]
Turn = Callable[[Tensor, Tensor], Tensor]  # (x [b h n d], shifts [n]) -> [b h n d]


@dataclass(frozen=True)
class Far:
    """Stored tokens of one sequence that lie in host memory, one behind the other, and what finds them again.

    first: how many stored tokens come before them
    index: over their keys [g m d], as `ops.index_keys` makes it
    """

    first: int
    index: Any
    values: Float[Tensor, "g m d"]
    positions: Int[Tensor, "g m"]

    @property
    def count(self) -> int:
        """Tokens per head."""
        return self.positions.shape[1]


def _nowhere(*_: object) -> Any:
    raise AssertionError("this Site was made without an attachment; give Site(attend=...)")


@dataclass(frozen=True)
class Site:
    """One call of one layer.

    A method never sees padding: where rows of a batch are padded, the attachment hands over the real tokens of one row
    at a time. So `keys` counts real tokens, the last `queries` of which are asking, and every row of the batch given to
    a method has the same length.

    layer, layers: index among the model's attention layers, and their number
    heads, kv_heads, head_size: of the tensors at hand: where processes share the heads of a layer, those here
    shard: which of the layer's heads these are
    queries, keys: tokens asking, tokens there to be looked at (the askers included)
    seen: tokens that went by, dropped ones included; the true position of the last query is `seen - 1`
    coming: tokens of the prompt that are read in later forwards, where the attachment was told how many
    scale, softcap: of the logits, as the model has them
    state: what this method wants to remember between calls on this layer and cache. Tensors with the batch first; they
        follow beam reordering; when tokens are taken back, what the prompt left is there again (`Method.dated`: it
        stays). Sequences that remember different shapes are asked apart
    settled: no stored key goes any more, but for tokens that are taken back
    handed: what this method hands from layer to layer within one forward: what it puts there is there in the layers
        behind, for the same sequences, and gone when the forward ends. Tensors with the batch first
    marks: what `Cache.mark` said of the stored keys, of a method that marks them
    far: for each sequence what lies in host memory, where the method had it moved there; `keys` counts it
    turn: (x [b h n d], shifts [n]) -> queries or keys as they would be so many positions later (or, below 0, earlier);
        None where the model's position embedding is not known. Linear in x
    attend: (q, k, v, selection) -> out; computes and records. A method calls it instead of an op's back end
    partial: the same, and the log-sum-exp of each row: for a method that merges a remainder with what it selects
    searched: (keys looked at, keys there); records what a search cost
    """

    layer: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    stage: Stage
    queries: int
    keys: int
    seen: int
    scale: float
    budget: Budget = FULL
    softcap: float | None = None
    seed: int = 0
    bytes_per_token: int = 0  # of the whole cache, for budgets in bytes
    settled: bool = False
    coming: int = 0
    state: State = field(default_factory=dict, repr=False, compare=False)
    handed: State = field(default_factory=dict, repr=False, compare=False)
    marks: Bool[Tensor, "b k"] | None = field(default=None, repr=False, compare=False)
    far: tuple[Far, ...] = field(default=(), repr=False, compare=False)
    turn: Turn | None = field(default=None, repr=False, compare=False)
    shard: Shard = WHOLE
    attend: Callable[[Tensor, Tensor, Tensor, Selection], Tensor] = field(default=_nowhere, repr=False, compare=False)
    partial: Callable[[Tensor, Tensor, Tensor, Selection], tuple[Tensor, Tensor]] = field(
        default=_nowhere, repr=False, compare=False
    )
    searched: Callable[[int | Tensor, int], Any] = field(default=_nowhere, repr=False, compare=False)

    @property
    def offset(self) -> int:
        """Key index of the first query."""
        return self.keys - self.queries

    @property
    def whole(self) -> int:
        """Tokens that went by, and those that are known to come with this prompt."""
        return self.seen + self.coming

    @property
    def group(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads

    @property
    def all_heads(self) -> int:
        """Query heads of the layer, in all processes."""
        return self.heads * self.shard.ranks

    @property
    def all_kv_heads(self) -> int:
        """Key/value heads of the layer, in all processes."""
        return self.kv_heads * self.shard.ranks


@dataclass(frozen=True)
class Seen:
    """What a method may look at when it scores, at the end of a prompt or after a token: exactly what it asked for.

    A probe is shown one after every forward, with all queries of it.

    positions: true positions of the stored keys, ascending
    queries: the last `observe_tokens` queries (fewer in a shorter prompt; after it one), after RoPE; None unless asked
        for
    tally: the sums of `Cache.tally` over all queries so far; None for a method that keeps none
    """

    keys: Float[Tensor, "b g k d"]
    values: Float[Tensor, "b g k d"]
    positions: Int[Tensor, "b g k"]
    queries: Float[Tensor, "b h w d"] | None = None
    tally: Float[Tensor, "b g k"] | None = None
