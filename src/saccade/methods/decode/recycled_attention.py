"""Recycled Attention: a full step now and then says which keys the cheap steps after it read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, pad

from saccade import ops
from saccade.core import bounds
from saccade.core.budget import FULL
from saccade.core.card import Card
from saccade.core.errors import BadOption, CannotRun
from saccade.core.method import Decode
from saccade.core.selection import Gather, Selection, dense
from saccade.core.site import Seen, Site
from saccade.methods.decode._lists import numbers, places

SLOTS = 3  # choices that are remembered: the one in use, the one before it, the prompt's
Memory = dict[str, Tensor]  # [b SLOTS ...]: "plan" 4, positions of "keys" g l, and for "dynamic" the "query" h d


class Plan(NamedTuple):
    """When a choice was made: tokens seen, keys stored, what the budget had left; and its number, the prompt's is 0."""

    seen: int
    stored: int
    saved: int
    number: int


@dataclass(frozen=True)
class RecycledAttention(Decode):
    """Most steps read the keys that the last full step attended to most, and the newest ones.

    A full step reads everything, and its attention ranks the keys:  C = sort_j max_{h in group} softmax(q_h K^T)_j.
    The i-th step after it reads the newest i keys and the first K - i of C: a new key takes the place of the worst.
    Neighbouring queries look at much the same keys; what the cheap steps miss, the next full one finds again. The
    prompt's last token makes the first choice. K follows from the budget, which pays for full steps too: of b(n) keys
    a query,  S b(n) = n + (S - 1) K.

    every_tokens: S, from one full step to the next; under "dynamic" the time in which the budget saves for one
    schedule: "stride": full at every S-th token; "dynamic": when a check says so and the budget has saved enough
    check_tokens: of "dynamic": from one check to the next, counted from the last full step
    similarity: of "dynamic": full where the query's cosine to that of the last full step, mean over heads, is less
    group: how the query heads of a key/value head rank together
    prompt_tokens: last tokens of the prompt whose attention, summed, makes the first choice

    Raises:
        BadOption: a number of tokens that is 0, or a similarity that is no number.
        CannotRun: so many tokens were taken back that the choice in use there is no longer remembered.
    Source: arXiv 2411.05787, version 1; carriex/recycled-attention (could not be had: not compared with).
    """

    dated: ClassVar[bool] = True
    card = Card(
        name="recycled-attention",
        title="Recycled Attention: Efficient inference for long-context language models",
        family="decode",
        paper="arXiv:2411.05787",
        year=2024,
        authors="Xu, Goyal, Choi",
        official="carriex/recycled-attention",
        summary="A full step now and then picks the keys that the steps between read; everything stays stored.",
        equation="o = softmax(q K_R^T / sqrt(d)) V_R;  R = the newest i keys and the best K - i of the last full step",
        usual=True,
        budget="stored keys that each new query reads, mean over full and cheap steps",
        needs=("queries",),
        departures=(
            "The budget is for all reads: full steps come out of it, and K follows. The paper fixes K and adds them. A"
            " full step that the budget has not saved for yet, as in a very short text, waits.",
            "Chosen keys are listed, not copied into a second cache: as many are read, fewer bytes held.",
            "A new key takes the place of the worst chosen one and stays until the next full step; what the authors"
            " drop in between could not be checked, nor how they rank under grouped heads (here: by the largest).",
            "The dynamic schedule decides for each layer and sequence, within what the budget has saved.",
            "Continued pre-training under the recycled mask is not part of this.",
        ),
        lacks={
            "gqa": "the query heads of a key/value head choose together; written out, each chooses for itself",
            "backward": "it reads a cache, which training does not have",
        },
    )

    every_tokens: int = 50
    schedule: Literal["stride", "dynamic"] = "stride"
    check_tokens: int = 5
    similarity: float = 0.8
    group: Literal["max", "mean"] = "max"
    prompt_tokens: int = 1

    def __post_init__(self):
        super().__post_init__()
        bounds.at_least_one(self, "every_tokens", "check_tokens", "prompt_tokens")
        if math.isnan(self.similarity):
            raise BadOption("recycled-attention.similarity=nan", "it is no number", "Give one from -1 to 1.")

    @property
    def observe_tokens(self) -> int:
        return self.prompt_tokens

    def check(self, site: Site) -> list[str]:
        budget, every = site.budget, self.every_tokens
        if budget.unit != "fraction":
            return [f"its full steps read all keys, however many; budget={budget} cannot pay for that: give a fraction"]
        if budget != FULL and budget.amount * every <= 1:
            return [f"full steps at every_tokens={every} alone use up budget={budget}; change one of the two"]
        return []

    def begin(self, seen: Seen, site: Site) -> None:
        if site.budget == FULL:
            return
        assert seen.queries is not None, "the card asks for queries"
        options = {"scale": site.scale, "softcap": site.softcap, "causal": site.keys == site.seen}
        votes = ops.column_scores(seen.queries, seen.keys, **options)
        plans = [Plan(site.seen, site.keys, 0, 0)] * len(votes)
        choice = self._choice(votes, seen.queries[:, :, -1], seen.positions, plans, site)
        site.state.update({name: torch.stack([x] * SLOTS, 1) for name, x in choice.items()})

    def select(self, q: Float[Tensor, "b h q d"], stored: Mapping[str, Tensor], site: Site) -> Selection:
        if site.budget == FULL:
            return dense(site.queries, site.keys)
        memory, reads, which = self._recalled(q, site), [], []
        choices = [memory["keys"][:, 0]]
        for i in range(site.queries):
            seen, end = site.seen - site.queries + i + 1, site.offset + i + 1
            plans = [Plan(*plan) for plan in memory["plan"][:, 0].tolist()]
            steps = [seen - plan.seen for plan in plans]
            left = [self._left(plan, n, site) for plan, n in zip(plans, steps)]
            full = [due and rest >= 0 for due, rest in zip(self._due(q[:, :, i], memory, steps, site), left)]
            cheap = [self._reads(plan.stored, site) for plan in plans]
            reads.append([(0, 0) if f else (k, min(k, n)) for f, k, n in zip(full, cheap, steps)])
            which.append(len(choices) - 1)
            if any(full):
                options = {"scale": site.scale, "softcap": site.softcap}
                votes = ops.column_scores(q[:, :, i : i + 1], stored["keys"][:, :, :end], **options)
                plans = [Plan(seen, end, rest, plan.number + 1) for rest, plan in zip(left, plans)]
                choice = self._choice(votes, q[:, :, i], stored["positions"][..., :end], plans, site)
                memory = _renewed(memory, full, choice)
                choices.append(memory["keys"][:, 0])
        site.state.update(memory)
        return _selection(choices, which, reads, stored["positions"], site)

    def _allowed(self, stored: int, steps: int, site: Site) -> int:
        """What so many steps from `stored` keys on may read: sum b n, less 1 for each, since b n is rounded down."""
        return math.floor(site.budget.amount * (steps * stored + steps * (steps + 1) / 2)) - steps

    def _reads(self, stored: int, site: Site) -> int:
        """K after a choice among `stored` keys, so that the next full step is paid when it is due."""
        spare = self._allowed(stored, self.every_tokens, site) - (stored + self.every_tokens)
        return max(1, min(site.budget.tokens(stored + 1), spare // max(1, self.every_tokens - 1)))

    def _left(self, plan: Plan, steps: int, site: Site) -> int:
        """Of the budget after a full step, so many steps behind the choice; below 0: it is not paid for yet."""
        cheap = self._reads(plan.stored, site) * (steps - 1)
        return plan.saved + self._allowed(plan.stored, steps, site) - cheap - (plan.stored + steps)

    def _due(self, q: Float[Tensor, "b h d"], memory: Memory, steps: Sequence[int], site: Site) -> list[bool]:
        """Which sequences want a full step, so many steps behind their last."""
        if self.schedule == "stride":
            return [n >= self.every_tokens for n in steps]
        checked = [n % self.check_tokens == 0 for n in steps]
        if not any(checked):
            return checked
        cosine = cosine_similarity(q.float(), memory["query"][:, 0].float(), dim=-1)
        cosine = site.shard.gather(cosine, 1).mean(-1)
        return [check and less for check, less in zip(checked, (cosine < self.similarity).tolist())]

    def _choice(
        self, votes: Float[Tensor, "b h k"], q: Tensor, positions: Int[Tensor, "b g k"], plans: list[Plan], site: Site
    ) -> Memory:
        """Positions of the best keys, best first: as many as the first cheap step reads beside its own."""
        grouped = votes.unflatten(1, (site.kv_heads, -1))
        worth = grouped.amax(2) if self.group == "max" else grouped.mean(2)
        count = min(worth.shape[-1], self._reads(plans[0].stored, site) - 1)
        new = {"plan": torch.tensor(plans), "keys": positions.gather(-1, worth.topk(count, -1).indices).int()}
        return new | {"query": q} if self.schedule == "dynamic" else new

    def _recalled(self, q: Float[Tensor, "b h q d"], site: Site) -> Memory:
        """What was remembered when the token before these queries had been read."""
        past, (b, h, _, d) = site.seen - site.queries, q.shape
        if "plan" not in site.state:  # a text that began empty
            plan = torch.tensor([Plan(past, site.offset, 0, 0)] * SLOTS)
            keys = torch.zeros(b, SLOTS, site.kv_heads, 0, dtype=torch.int32, device=q.device)
            none = {"plan": plan.expand(b, -1, -1), "keys": keys}
            return none | {"query": q.new_zeros(b, SLOTS, h, d)} if self.schedule == "dynamic" else none
        slots = [_order([Plan(*p) for p in plans], past) for plans in site.state["plan"].tolist()]
        if all(some == list(range(SLOTS)) for some in slots):
            return dict(site.state)
        order = torch.tensor(slots)
        row = torch.arange(b)[:, None]
        return {name: x[row.to(x.device), order.to(x.device)] for name, x in site.state.items()}


def _order(plans: Sequence[Plan], past: int) -> list[int]:
    """The slots, from that of the choice in use when `past` tokens were seen.

    Raises:
        CannotRun: it has been forgotten.
    """
    i = next((i for i, plan in enumerate(plans) if plan.seen <= past), SLOTS)
    if i == 0 or (i < SLOTS and (plans[i].seen == past or plans[i - 1].number == plans[i].number + 1)):
        return [i, min(i + 1, SLOTS - 1), SLOTS - 1]
    made = " and ".join(str(seen) for seen in sorted({plan.seen for plan in plans}))
    raise CannotRun(
        f"go on with recycled-attention from token {past}, up to which tokens were taken back",
        f"only the choices made at tokens {made} are remembered, not the one in use there",
        "Take back fewer tokens, or all that came after the prompt.",
    )


def _renewed(memory: Memory, rows: Sequence[bool], new: Memory) -> Memory:
    """With a new choice in the first slot of some sequences."""
    out = {}
    for name, value in new.items():
        width = max(memory[name].shape[-1], value.shape[-1])
        old, value = (pad(x, (0, width - x.shape[-1]), value=-1) for x in (memory[name], value))
        mine = torch.tensor(rows, device=old.device).view(-1, *[1] * (old.dim() - 1))
        out[name] = torch.where(mine, torch.stack([value, old[:, 0], old[:, -1]], 1), old)
    return out


def _selection(
    choices: list[Tensor], which: list[int], reads: list[list[tuple[int, int]]], positions: Tensor, site: Site
) -> Selection:
    """`reads`: for each query and sequence how many keys, and how many of them are the newest; 0 are a full step's."""
    shape, full = {"queries": site.queries, "keys": site.keys}, [n == 0 for row in reads for n, _ in row]
    if all(full):
        return dense(**shape)
    at = positions.device
    count, newest = (numbers([[read[i] for read in row] for row in reads], at) for i in (0, 1))  # [b q 1]
    width = max(n for row in reads for n, _ in row)
    place, longest = torch.arange(width, device=at), max(width, *[x.shape[-1] for x in choices])
    chosen = torch.stack([pad(x, (0, longest - x.shape[-1]), value=-1) for x in choices], 2)
    chosen = chosen if which == [*range(len(choices))] else chosen[:, :, which]  # [b g q l]
    chosen = chosen.gather(-1, (place - newest).clamp(min=0)[:, None].expand(-1, chosen.shape[1], -1, -1))
    recent = torch.arange(site.seen - site.queries, site.seen, device=at)[:, None] - place
    wanted = torch.where((place < newest)[:, None], recent, chosen).masked_fill((place >= count)[:, None], -1)
    index = places(positions, wanted.int().contiguous()).repeat_interleave(site.group, 1)
    if not any(full):
        return Gather(index=index, shared=site.group, **shape)
    end = torch.where(count[..., 0] == 0, torch.arange(site.offset + 1, site.keys + 1, device=at), 0)
    ranges = torch.stack([torch.zeros_like(end), end], -1).int()[:, None, :, None]
    return Gather(index=index, ranges=ranges.expand(-1, site.heads, -1, -1, -1), **shape)
