"""HiP: a tree search finds the keys that each block of queries attends to most, in log n levels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from saccade import ops
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Sparse
from saccade.core.selection import Gather, Selection, dense
from saccade.core.site import Site


@dataclass(frozen=True)
class Hip(Sparse):
    """Halve groups of key blocks, score one block of each half, keep the better half of the groups; repeat.

    For a block of queries that ends before key `end`, the keys [sink, end - window) are cut into m = k / b_k groups of
    key blocks. At each level a group (i, z) becomes (i, z // 2) and (i + z // 2, z - z // 2), and the m groups of
    largest  max_{q, t} q . k_t  over the representative block's tokens stay, until each is one block. Rows then attend
    exactly to sinks, those blocks and the window.
    The budget pays for k + sink + window keys a row. sink_tokens and window_tokens shrink to an eighth and a third of
    that where they would take more, query blocks to the window, and dense_layers to half of the whole model's budget.

    query_block_tokens, key_block_tokens: b_q, b_k
    query_stride: every such query of a block scores
    dense_layers: first layers that stay dense; the others pay for them
    refresh_steps: decoding searches anew at every such step, and reads the same keys in between
    rep: the block that stands for a group: its middle, its first, or ("oracle") whichever scores best, which finds the
        exact top m and takes as long as attending
    share_in_group: query heads of one key/value head search together, by their largest score

    Raises:
        BadOption: an empty block or window, or a stride or refresh of 0.
    Source: arXiv 2406.09827, algorithms 1 and 2; DeepAuto-AI/hip-attention, v1.1.
    """

    card = Card(
        name="hip",
        title="HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning",
        family="sparse",
        paper="arXiv:2406.09827",
        year=2024,
        authors="Lee, Park, Lee, Kim, Nam, Park, Hwang",
        official="DeepAuto-AI/hip-attention",
        licence_of_official="FSL-1.1-MIT",
        summary="A binary tree search over groups of keys finds each query block's best keys in log n levels.",
        equation="split each group in two; keep the m of largest max q . k_representative; until each is a block",
        usual=True,
        budget="keys a row reads: selected, sinks and window together; dense layers are paid for by the others",
        departures=(
            "k follows from the budget; the paper fixes 512, with 16 sinks and a window of 256 beside it.",
            "Dense layers are inside the budget: at most dense_layers, and no more than half of it pays for.",
            "Decoding searches for the one query; a key that leaves the window between searches waits for the next.",
            "Search levels end where every group is one block, which is what the authors' loop length comes to.",
            "share_in_group is ours. What version 1.0 had beside it (a wider start, a low-resolution estimator, SparQ"
            " scores, dense first queries, random representatives) is left out, as in 1.1.",
        ),
        lacks={
            "chunks": "keys per row follow from the length there is, query blocks start where a forward starts",
            "causality": "the queries of a block choose together, so an early one follows later ones of its block",
            "cache-ops": "after tokens are taken back the next one searches anew, instead of at the step it would have",
        },
    )

    query_block_tokens: int = 64
    key_block_tokens: int = 2
    sink_tokens: int = 16
    window_tokens: int = 256
    query_stride: int = 2
    dense_layers: int = 3
    refresh_steps: int = 8
    rep: Literal["center", "first", "oracle"] = "center"
    share_in_group: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("query_block_tokens", "key_block_tokens", "window_tokens", "query_stride", "refresh_steps"):
            if getattr(self, name) < 1:
                raise BadOption(f"hip.{name}=0", "it takes at least 1", "Leave it away for the authors' value.")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "decode")

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        if site.layer < self._dense(site):
            return dense(site.queries, site.keys)
        return self._prefill(q, k, site) if site.stage == "prefill" else self._decode(q, k, site)

    # --- what the budget pays for -----------------------------------------------------------------------------------

    def _dense(self, site: Site) -> int:
        """How many of the first layers are dense. A budget in tokens holds for every row of every layer: none."""
        share = site.budget.amount if site.budget.unit == "fraction" else 0.0
        return min(self.dense_layers, int(share * site.layers / 2))

    def _row(self, n: int, site: Site) -> int:
        """Keys that the last of n rows may read, so that all layers together stay within the budget."""
        budget, whole = site.budget, self._dense(site)
        if whole and budget.amount < 1:
            budget = Budget((budget.amount * site.layers - whole) / (site.layers - whole))
        return budget.row_tokens(n) if site.stage == "prefill" else budget.tokens(n)

    def _sizes(self, n: int, site: Site) -> tuple[int, int, int]:
        """Sinks, window and selected key blocks of such a row."""
        row = self._row(n, site)
        sinks, window = min(self.sink_tokens, row // 8), min(self.window_tokens, max(1, row // 3))
        return sinks, window, (row - sinks - window) // self.key_block_tokens

    # --- where to look ----------------------------------------------------------------------------------------------

    def _prefill(self, q: Tensor, k: Tensor, site: Site) -> Selection:
        """One search for each block of queries."""
        if self._row(site.keys, site) >= site.keys:
            return dense(site.queries, site.keys)
        sinks, window, most = self._sizes(site.keys, site)
        block = min(self.query_block_tokens, 1 << (window.bit_length() - 1))  # a query's own key lies in the window
        count = -(-site.queries // block)
        padding = q[:, :, -1:].expand(-1, -1, count * block - site.queries, -1)
        asking = torch.cat([q, padding], 2).unflatten(2, (count, block))
        asking = asking[:, :, :, min(self.query_stride, block) - 1 :: self.query_stride]
        end = (torch.arange(1, count + 1, device=q.device) * block + site.offset).clamp(max=site.keys)
        sizes = torch.tensor([[sinks, window, most]] * count, device=q.device)
        found = self._search(asking, k, sizes, end - window)
        return self._gather(found, sizes[:, 0], end - window, end - window, end, block, site)

    def _decode(self, q: Tensor, k: Tensor, site: Site) -> Gather:
        """A search at every `refresh_steps`-th query; those between go by the last one."""
        first = self._first_search(site)
        asking = list(range(first, site.queries, self.refresh_steps))
        old = [int(site.state["searched"][0])] if first else []
        there = old + [site.offset + row + 1 for row in asking]  # keys at each search
        sizes = torch.tensor([self._sizes(n, site) for n in there], device=q.device)
        limit = torch.tensor(there, device=q.device) - sizes[:, 1]
        found = self._search(q[:, :, asking, None], k, sizes[len(old) :], limit[len(old) :])
        found = self._join(found, there[-1], bool(old), site)
        row = torch.arange(site.queries, device=q.device)
        by = torch.div(row - first, self.refresh_steps, rounding_mode="floor") + len(old)
        end = row + site.offset + 1
        # a row whose budget covers all of its keys reads them all
        whole = torch.tensor([self._row(n, site) >= n for n in end.tolist()], device=q.device)
        found = found[:, :, by].masked_fill(whole[:, None], -1)
        sinks, limit, start = (x.masked_fill(whole, 0) for x in (sizes[by, 0], limit[by], end - sizes[by, 1]))
        return self._gather(found, sinks, limit, start, end, 1, site)

    def _join(self, found: Tensor, searched: int, old: bool, site: Site) -> Tensor:
        """What these searches found, after what the one before them found where that is in use; keeps the last.

        As wide as any search up to here may be, so that the rows of a batch can be joined.
        """
        width = self._row(site.keys, site) // self.key_block_tokens
        parts = [site.state["found"][:, :, None], found] if old else [found]
        found = torch.cat([pad(x, (0, width - x.shape[-1]), value=-1) for x in parts], 2)
        site.state["found"] = found[:, :, -1]
        for name, value in {"searched": searched, "keys": site.keys}.items():
            site.state[name] = torch.full(found.shape[:1], value, device=found.device)
        return found

    def _first_search(self, site: Site) -> int:
        """Which of these queries searches first: the next in step, or at once if the stored keys have changed."""
        state = site.state
        if "keys" not in state or (state["keys"] != site.offset).any() or len(state["searched"].unique()) > 1:
            return 0
        return max(0, int(state["searched"][0]) + self.refresh_steps - site.offset - 1)

    def _gather(
        self, found: Tensor, sinks: Tensor, limit: Tensor, start: Tensor, end: Tensor, block: int, site: Site
    ) -> Gather:
        """Sinks, the key blocks found, cut at `limit`, and the window [start, end): disjoint."""
        tokens = found[..., None] + torch.arange(self.key_block_tokens, device=found.device)
        tokens = torch.where((found >= 0)[..., None] & (tokens < limit[:, None, None]), tokens, -1).flatten(-2)
        edges = [torch.zeros_like(sinks), torch.minimum(sinks, end), torch.maximum(start, sinks), end]
        ranges = torch.stack(edges, -1).unflatten(-1, (2, 2)).expand(*found.shape[:2], -1, -1, -1).int()
        return Gather(index=tokens.int(), ranges=ranges, q_block=block, queries=site.queries, keys=site.keys)

    # --- the search -------------------------------------------------------------------------------------------------

    def _search(
        self,
        q: Float[Tensor, "b h n r d"],
        k: Float[Tensor, "b g k d"],
        sizes: Int[Tensor, "n 3"],
        limit: Int[Tensor, " n"],
    ) -> Int[Tensor, "b h n m"]:
        """First tokens of the best key blocks in [sinks, limit) for each of n groups of queries; -1 for none."""
        if self.share_in_group and q.shape[1] > k.shape[1]:
            together = rearrange(q, "b (g s) n r d -> b g n (s r) d", g=k.shape[1])
            return self._search(together, k, sizes, limit).repeat_interleave(q.shape[1] // k.shape[1], 1)
        sinks, _, most = sizes.unbind(-1)
        width = int(most.max()) if len(most) else 0
        blocks = (-(-(limit - sinks) // self.key_block_tokens)).clamp(min=0)
        score = functools.partial(ops.block_logits, q, k, sinks, self.key_block_tokens)
        if not width or not blocks.any():
            return torch.full((*q.shape[:3], width), -1, device=q.device)
        index, size = (self._exact if self.rep == "oracle" else self._tree)(score, q, blocks, most, width)
        return torch.where(size > 0, sinks[:, None] + index * self.key_block_tokens, -1)

    def _tree(self, score: Callable, q: Tensor, blocks: Tensor, most: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Groups of one block each, by halving: their numbers and sizes (0: none)."""
        g = torch.arange(width, device=q.device)
        parts = most.clamp(min=1)[:, None]
        index, after = blocks[:, None] * g // parts, blocks[:, None] * (g + 1) // parts
        size = torch.where(g < most[:, None], after - index, 0)
        index, size = (x.int().expand(*q.shape[:3], width) for x in (index, size))
        for _ in range((int(size.max()) - 1).bit_length()):
            half = size // 2
            index, size = torch.cat([index, index + half], -1), torch.cat([half, size - half], -1)
            middle = index + size // 2 if self.rep == "center" else index
            value = score(middle).masked_fill(size < 1, -torch.inf)
            index, size = _keep_best(value, index, size, most, width)
        return index, size

    def _exact(self, score: Callable, q: Tensor, blocks: Tensor, most: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """What the tree would find if every group were represented by its best block: the best blocks of all."""
        index = torch.arange(int(blocks.max()), dtype=torch.int32, device=q.device).expand(*q.shape[:3], -1)
        size = (index < blocks[:, None]).int()
        return _keep_best(score(index).masked_fill(size < 1, -torch.inf), index, size, most, width)


def _keep_best(
    value: Float[Tensor, "b h n l"], index: Tensor, size: Tensor, most: Int[Tensor, " n"], width: int
) -> tuple[Int[Tensor, "b h n m"], Int[Tensor, "b h n m"]]:
    """The `most` groups of highest value of each row, in places 0 .. width - 1."""
    keep = min(width, value.shape[-1])
    if bool((most >= keep).all()):  # of each as many: which of them is better does not matter
        top = ops.topk(value, keep).long()
        use, top = top >= 0, top.clamp(min=0)
    else:
        value, top = value.topk(keep, -1)
        use = (value > -torch.inf) & (torch.arange(keep, device=top.device) < most[:, None])
    rest = (0, width - keep)
    return pad(index.gather(-1, top), rest), pad(torch.where(use, size.gather(-1, top), 0), rest)
