"""Sparsifiner: a low-rank guess of the attention map tells every query which keys to look at."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from saccade import ops
from saccade.core.card import Card
from saccade.core.errors import BadInput, BadOption
from saccade.core.method import Mixer, Slot
from saccade.core.selection import Gather, causal_mask, dense
from saccade.methods.mixers._pieces import fresh, in_pieces, refuse_causal_pictures

LONGEST = 64  # tokens of a text, unless something else is asked for
SPREAD = 0.02  # standard deviation of both bases at the start, cut at two of them


class Sparsifiner(Mixer):
    """Attention over the keys that a cheap predictor expects to matter most, for every query and head by itself.

    C = softmax_r(s (W_q q) (W_k K)^T D),  A = C U^T:  D and U [N r] are learned, one row for each place of a token.
    A query attends to the keys of the largest entries of its row of A, as many as the budget says. To find them C keeps
    its few largest entries and U its absolute value where it is above a floor, so that both factors are sparse.
    Trained in two phases: `phase = "fit"`, attention is dense, and `fit_loss` draws A, signed and whole, to the
    attention map; then "use", where the choice has no gradient and everything else learns with it.
    In a causal text the sum over keys goes up to the query, and so do its keys.

    longest_tokens: N, rows of D and U; none: the cells of a picture, 64 for a text
    reduce: N / r, tokens for each column of D and U
    coefficients: of each query that stay
    floor: what an entry of U must exceed
    scale: s by the number of "heads", as the official code has it, or by the "size" of what is compared
    phase: "fit" or "use"

    Raises:
        BadOption: numbers that leave nothing. BadInput: more tokens than it has places for.
        CannotRun: a picture in which no token may see a later one. BadBudget: a budget in bytes.

    Source: arXiv 2303.13755, section 3; lim142857/Sparsifiner, src/models/sparsifiner.py (MaskPredictor), losses.py.
    """

    card = Card(
        name="sparsifiner",
        title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        family="mixers",
        paper="arXiv:2303.13755",
        year=2023,
        authors="Wei, Duke, Jiang, Aarabi, Taylor, Shkurti",
        official="lim142857/Sparsifiner",
        licence_of_official="MIT",
        summary="A low-rank guess of the attention map, learned from it, picks the keys of every query and head.",
        equation="A = softmax_r(s (W_q q) (W_k K)^T D) |U|^T; query i sees the keys of the largest entries of A_i",
        budget="keys of each query and head, a share of those that it may see",
        departures=(
            "There is no class token in the nets here, and so no row that sees all keys.",
            "The share of keys is rounded down, to at least one; the paper rounds up.",
            "The target of the first phase is the layer's own dense map: the teacher is the same net, frozen.",
            "Tokens are not pruned on top, and thresholds in the place of a number of keys are left out.",
            "A causal text is ours, with sums over the keys so far.",
        ),
    )

    def __init__(
        self,
        slot: Slot,
        *,
        longest_tokens: int | None = None,
        reduce: int = 6,
        coefficients: int = 8,
        floor: float = 0.02,
        scale: Literal["heads", "size"] = "heads",
        phase: Literal["fit", "use"] = "use",
    ):
        super().__init__(slot)
        cells = slot.grid[0] * slot.grid[1] if slot.grid else None
        self._check(cells, longest_tokens, reduce, coefficients)
        self.longest = cells or longest_tokens or LONGEST
        size = slot.channels // slot.heads
        small, rank = max(1, size // 2), max(1, self.longest // reduce)
        self.coefficients, self.floor, self.phase = min(coefficients, rank), floor, phase
        self.scale = (slot.heads if scale == "heads" else small) ** -0.5
        self.qkv = nn.Linear(slot.channels, 3 * slot.channels, bias=False)
        self.out = nn.Linear(slot.channels, slot.channels, bias=False)
        self.small_q, self.small_k = nn.Linear(size, small), nn.Linear(size, small)
        self.down, self.up = (nn.Parameter(torch.empty(self.longest, rank)) for _ in range(2))
        for basis in (self.down, self.up):
            nn.init.trunc_normal_(basis, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD)

    def _check(self, cells: int | None, longest: int | None, reduce: int, coefficients: int) -> None:
        refuse_causal_pictures("sparsifiner", self.slot)
        if cells and longest not in (None, cells):
            asked = f"sparsifiner.longest_tokens={longest}"
            raise BadOption(asked, f"the picture has {cells} cells", "Leave it away.")
        for name, value in {"longest_tokens": longest, "reduce": reduce, "coefficients": coefficients}.items():
            if value is not None and value < 1:
                raise BadOption(f"sparsifiner.{name}={value}", "it must be 1 or more", "Give such a number.")

    def forward(self, x, state=None, lengths=None):
        state = state or fresh(x, self.slot.heads)
        out, state = in_pieces(*self._heads(x), state, lengths, self._attend)
        return self.out(rearrange(out, "b h n d -> b n (h d)")), state

    def reference(self, x):
        """Query by query: coefficients, the row of the map, its largest entries, softmax over their keys."""
        q, k, v = self._heads(x)
        n, out, basis = x.shape[1], torch.zeros_like(v), self.up.detach().abs()
        basis = torch.where(basis > self.floor, basis, 0.0)
        for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).reshape(-1, 3).tolist():
            there = i + 1 if self.slot.causal else n
            with torch.no_grad():
                asks, keys = self.small_q(q[b, h, i]), self.small_k(k[b, h, :there])
                folded = sum(keys[j][:, None] * self.down[j] for j in range(there))
                coef = (asks @ folded * self.scale).softmax(-1)
                largest = coef.argsort(descending=True, stable=True)[: self.coefficients]
                row = coef[largest] @ basis[:there, largest].T
            seen = row.argsort(descending=True, stable=True)[: self.slot.budget.tokens(there)]
            weights = (k[b, h, seen] @ q[b, h, i] * q.shape[-1] ** -0.5).softmax(0)
            out[b, h, i] = weights @ v[b, h, seen]
        return self.out(rearrange(out, "b h n d -> b n (h d)"))

    def fit_loss(self, x: Float[Tensor, "b n c"]) -> Tensor:
        """Squared distance between the guess and the attention map, summed; only the predictor has gradients."""
        with torch.no_grad():
            q, k, _ = self._heads(x)
            logits = q @ k.mT * q.shape[-1] ** -0.5
            ahead = torch.zeros_like(logits[0, 0], dtype=torch.bool)
            if self.slot.causal:
                ahead = ~causal_mask(x.shape[1], x.shape[1], x.device)
            attention = logits.masked_fill(ahead, -torch.inf).softmax(-1)
        return (self.guess(q, k, sparse=False).masked_fill(ahead, 0.0) - attention).square().sum()

    def guess(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b h k d"], sparse: bool = True
    ) -> Float[Tensor, "b h q k"]:
        """A, for the last queries over all keys; sparse: as it is used, otherwise as it is fitted."""
        n = k.shape[2]
        asks, keys = self.small_q(q), self.small_k(k)
        if self.slot.causal:
            folded = torch.einsum("bhnd,nr->bhndr", keys, self.down[:n]).cumsum(2)[:, :, n - q.shape[2] :]
            logits = torch.einsum("bhqd,bhqdr->bhqr", asks, folded)
        else:
            logits = asks @ torch.einsum("bhnd,nr->bhdr", keys, self.down[:n])
        coef, basis = (logits * self.scale).softmax(-1), self.up[:n]
        if sparse:
            basis = torch.where(basis.abs() > self.floor, basis.abs(), 0.0)
            largest = coef.topk(self.coefficients, -1)
            coef = torch.zeros_like(coef).scatter(-1, largest.indices, largest.values)
        return coef @ basis.T

    def keys(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b h k d"]) -> Int[Tensor, "b h q l"]:
        """Keys of each query, -1: none; of equal entries the first."""
        queries, n = q.shape[2], k.shape[2]
        with torch.no_grad():
            row = self.guess(q, k)
        if self.slot.causal:
            row = row.masked_fill(~causal_mask(queries, n, q.device), -torch.inf)
        there = range(n - queries + 1, n + 1) if self.slot.causal else [n] * queries
        count = torch.tensor([self.slot.budget.tokens(m) for m in there], device=q.device)
        best = row.argsort(dim=-1, descending=True, stable=True)[..., : int(count.max())]
        return torch.where(torch.arange(best.shape[-1], device=q.device) < count[:, None], best, -1)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.slot.heads)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = {"queries": q.shape[2], "keys": k.shape[2], "causal": self.slot.causal}
        if k.shape[2] > self.longest or (self.slot.grid and k.shape[2] != self.longest):
            asked = f"sparsifiner over {k.shape[2]} tokens"
            raise BadInput(asked, f"it has {self.longest} places", "Make it for so many: longest_tokens.")
        if self.phase == "fit":
            return ops.attend(q, k, v, dense(**shape))[0]
        return ops.attend(q, k, v, Gather(index=self.keys(q, k).int(), **shape))[0]
