"""MoA: every head keeps a window of its own, which grows with the text by a rule that was found offline."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import ops
from saccade.core import bounds
from saccade.core.artefact import Artefact
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.selection import Spans
from saccade.core.site import Site

LIMITS = tuple(i / 16 for i in range(2, 16))  # mean densities for which a plan is searched
REACH = 2  # rules must hold up to this many times the longest text of the profile
NEARLY = 0.9  # of a limit: a plan should use that much at every length


@dataclass(frozen=True)
class MoA(Cache):
    """Each head sees the first tokens and a window; together  S(n) = alpha + beta n  keys in a prompt of n tokens.

    Gradients say what the loss loses, to first order, with each entry of a head's map A (G = dL/dA):
    E_ij = -A_ij (G_ij - sum_k G_ik A_ik) / (1 - A_ij);  a rule costs the sum of |E| over the blocks it leaves out. Of
    all heads' rules the plan is taken that costs least at a mean density within the budget, at every length.

    sink_tokens: first tokens that every head keeps, part of its span; fewer where the span is smaller
    block_tokens: of the blocks in which influence is added up
    rule_steps: of the grid of rules: alpha goes up to the longest text of the profile, beta to 1, in so many steps
    rules_per_layer: different rules in one layer, 1 or 2; 0: any number
    answer_keys, answer_key_words: pass keys in the longest text, at most ten, and words of each; in shorter texts fewer
    prose_weight: of the loss of the prose's last quarter, beside the mean loss of the answers
    search_density: where plans for different lengths are compared on the text that was held out

    Raises:
        BadOption: no block or step, more rules than two in a layer, no key or word, more than ten keys, a weight below
            0, or a density outside (0, 1].
    Source: arXiv 2406.14909, sections 3 and 4; thu-nics/MoA.
    """

    rolling: ClassVar[bool] = True
    by_position = True
    card = Card(
        name="moa",
        title="MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
        family="sparse",
        paper="arXiv:2406.14909",
        year=2024,
        authors="Fu, Huang, Ning, Zhang, Chen, Wu, Wang, Huang, Li, Wang and others",
        official="thu-nics/MoA",
        licence_of_official="MIT",
        summary="Every head has a window of its own length, growing with the text by a rule that gradients chose.",
        equation="S_h(n) = alpha_h + beta_h n;  min sum_h sum_dropped |E_h|,  mean_h S_h(n) / n <= budget",
        budget="mean keys per head over the whole model at the end of the prompt",
        calibrated=True,
        departures=(
            "Plans are searched for fourteen densities, and one between two of them is their mix: any budget can be"
            " asked for, and is spent. The paper searches for one density.",
            "The search is by prices on density, not by a mixed-integer solver (`ops.assign`).",
            "Texts of the profile are prose with pass keys, asked for at the end, 512 to 2,048 tokens: answers and the"
            " last quarter of the prose are the loss. The paper has answers that the model gave itself to questions on"
            " Multi-News, at 2k to 8k tokens.",
            "Plans that weigh the lengths of the profile differently are compared on a text of the longest length that"
            " was held out; the paper takes a length of its own (12k).",
            "Windows are in tokens, not in blocks, and a head's span follows from the prompt alone: the authors add the"
            " 1,024 tokens that may come, and round up to blocks. The query's own token comes on top.",
            "Heads whose span is the whole prompt also keep all that comes after it.",
            "32 first tokens and blocks of 32, not 64, for small contexts. Weights are not reordered: rows of equal"
            " length are stored together instead, which changes no output.",
        ),
        lacks={
            "chunks": "spans follow from the prompt's length, known only at its end; tokens read after the prompt agree"
            " exactly, however they are cut",
        },
    )

    sink_tokens: int = 32
    block_tokens: int = 32
    rule_steps: int = 8
    rules_per_layer: int = 2
    answer_keys: int = 8
    answer_key_words: int = 2
    prose_weight: float = 1.0
    search_density: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        bounds.at_least_one(self, "block_tokens", "rule_steps", "answer_keys", "answer_key_words")
        bounds.share(self, "search_density", "the pairs")
        for name, most in (("rules_per_layer", 2), ("answer_keys", 10)):
            if getattr(self, name) > most:
                raise BadOption(f"moa.{name}={getattr(self, name)}", f"it takes at most {most}", "Give fewer.")
        if not self.prose_weight >= 0:
            raise BadOption(f"moa.prose_weight={self.prose_weight}", "it takes a number from 0", "Leave it away.")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("prefill", "evict")

    def check(self, site: Site) -> list[str]:
        if self.artefact is None:
            return ["no plan was searched for this model: saccade calibrate moa"]
        found, here = tuple(self.artefact.tensors["alpha"].shape[:2]), (site.layers, site.all_kv_heads)
        if found != here:
            return [f"its plan is for {found[0]} layers of {found[1]} key/value heads, here: {here[0]} of {here[1]}"]
        return []

    # --- one prompt -------------------------------------------------------------------------------------------------

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Spans:
        site.state["prompt"] = torch.full((q.shape[0],), site.seen)  # on the host, where it is asked for
        spans = self._spans(site.seen, site)
        sinks = spans.clamp(max=self.sink_tokens)
        window = torch.where(spans < site.seen, spans - sinks + 1, max(site.keys, 1))
        sinks, window = (x.repeat_interleave(site.group).to(q.device) for x in (sinks, window))
        return Spans(sinks=sinks, window=window, queries=site.queries, keys=site.keys)

    def visible(
        self, q_position: Int[Tensor, "r q"], k_position: Int[Tensor, "r k"], head: Int[Tensor, " r"], site: Site
    ) -> Bool[Tensor, "r q k"]:
        behind = q_position[..., None] - k_position[:, None]
        out = torch.empty_like(behind, dtype=torch.bool)
        prompt = _prompts(site, len(head))
        for n in prompt.unique().tolist():
            rows = (prompt == n).to(head.device)
            spans = self._spans(n, site).to(head.device)[head[rows], None, None]
            sinks = spans.clamp(max=self.sink_tokens)
            near = (k_position[rows, None] < sinks) | (behind[rows] <= spans - sinks)
            out[rows] = near | (spans >= n)
        return out

    def reach(self, queries: Sequence[int], site: Site) -> list[list[tuple[int, int]]]:
        """`visible` in numbers: for each sequence and head how many first tokens, and how many before itself."""
        out = []
        for n, prompt in zip(queries, _prompts(site, len(queries)).tolist()):
            each = [(min(s, self.sink_tokens), s) for s in self._spans(prompt, site).tolist()]
            out.append([(sinks, n if s >= prompt else s - sinks) for sinks, s in each])
        return out

    def _spans(self, prompt: int, site: Site) -> Int[Tensor, " g"]:
        """Keys of each head of this layer, beside the query's own."""
        key = prompt, site.budget.tokens(prompt, site.bytes_per_token)
        if key not in self._found:
            self._found[key] = self.spans(*key)
        return site.shard.mine(self._found[key][site.layer])

    @functools.cached_property
    def _found(self) -> dict[tuple[int, int], Int[Tensor, "layers g"]]:
        """Spans that were worked out: every token asks again."""
        return {}

    def spans(self, prompt: int, held: int) -> Int[Tensor, "layers g"]:
        """S(n) of every head, `held` on average: between the last plan within that and the next, as far as it goes.

        Before the first plan comes one key for every head, after the last the whole prompt.
        """
        assert self.artefact is not None, "check refuses to run without a plan"
        alpha, beta = (self.artefact.tensors[name].double() for name in ("alpha", "beta"))
        if held >= prompt:
            return torch.full(alpha.shape[:2], prompt)
        plans = (alpha + beta * prompt).clamp(1, max(1, prompt))
        plans = torch.cat([torch.ones_like(plans[..., :1]), plans, torch.full_like(plans[..., :1], prompt)], -1)
        mean = plans.mean((0, 1))
        last = int((mean <= held).nonzero()[-1])
        part = (held - mean[last]) / (mean[last + 1] - mean[last])
        return (plans[..., last].lerp(plans[..., last + 1], part) + 1e-9).floor().long()

    # --- offline ----------------------------------------------------------------------------------------------------

    @property
    def profile_options(self) -> tuple[float, ...]:
        """What a profile depends on."""
        return self.block_tokens, self.answer_keys, self.answer_key_words, self.prose_weight

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        """Plans for fourteen densities, from the influence of key blocks in texts made of the samples."""
        study = model.influence(self, samples)
        maps, lengths = study.profile(progress), study.lengths
        maps = [x.unflatten(1, (model.kv_heads, -1)).amax(2) for x in maps]  # a group's most demanding head speaks
        rules = self.rules(lengths)
        costs = [self.costs(x, rules, n) for x, n in zip(maps, lengths)]
        weighed = {"all": sum(costs) / len(costs), **{str(n): cost for n, cost in zip(lengths, costs)}}
        losses = {} if study.held_out is None else {n: self._loss(study, c, rules) for n, c in weighed.items()}
        best = weighed[min(losses, key=losses.__getitem__, default="all")]
        plans = [self._plan(best, rules, lengths, limit) for limit in LIMITS]
        alpha, beta = (torch.stack(x, -1).float() for x in zip(*plans))
        figures = {"limits": LIMITS, "lengths": lengths, "held_out_losses": losses}
        return model.artefact(self, {"alpha": alpha, "beta": beta}, samples, figures)

    def rules(self, lengths: Sequence[int]) -> Float[Tensor, "2 rules"]:
        """(alpha, beta) of the grid that make a span at the shortest length and no more than the text at the longest
        and at REACH times that; everything, (0, 1), is among them."""
        longest, steps = lengths[-1], self.rule_steps
        alpha = torch.linspace(-longest, longest, 2 * steps + 1, dtype=torch.float64)
        rules = torch.cartesian_prod(alpha, torch.linspace(0, 1, steps + 1, dtype=torch.float64)).T
        fits = rules[0] + rules[1] * lengths[0] > 0
        for n in (longest, REACH * longest):
            fits &= rules[0] + rules[1] * n <= n
        return rules[:, fits]

    def costs(self, maps: Float[Tensor, "layers g nb nb"], rules: Float[Tensor, "2 rules"], n: int) -> Tensor:
        """[layers g rules]: influence of the blocks that each rule leaves out at n tokens."""
        blocks, sinks = maps.shape[-1], self.sink_tokens // self.block_tokens
        ahead = torch.arange(blocks)[:, None] - torch.arange(blocks)
        kept = maps.double().clone()
        kept[..., :sinks] = 0
        by_distance = torch.zeros(*maps.shape[:2], blocks, dtype=torch.float64)
        by_distance.index_add_(-1, ahead.clamp(min=0).flatten(), kept.tril().flatten(2))
        beyond = torch.nn.functional.pad(by_distance.flip(-1).cumsum(-1).flip(-1), (0, 1))
        window = (rules[0] + rules[1] * n).clamp(max=n) - self.sink_tokens
        width = (window / self.block_tokens).floor().clamp(1, blocks).long()
        width[rules[0] + rules[1] * n >= n] = blocks
        return beyond[..., width]

    def _loss(self, study: Any, cost: Float[Tensor, "layers g rules"], rules: Float[Tensor, "2 rules"]) -> float:
        """Of the text that was held out, under the plan that costs least."""
        alpha, beta = self._plan(cost, rules, study.lengths, self.search_density)
        n = study.lengths[-1]
        return study.loss((alpha + beta * n).clamp(1, n).long(), self.sink_tokens)

    def _plan(self, cost: Tensor, rules: Tensor, lengths: Sequence[int], limit: float) -> tuple[Tensor, Tensor]:
        """alpha and beta [layers g] of the plan within a mean density, at the lengths of the profile and beyond."""
        at = torch.tensor([*lengths, REACH * lengths[-1]], dtype=torch.float64)[:, None]
        density = ((rules[0] + rules[1] * at) / at).clamp(max=1)
        chosen = ops.assign(cost, density, limit, kinds=self.rules_per_layer, least=NEARLY * limit)
        if chosen is None:  # no rule of the grid is that short: the shortest
            chosen = density.amax(0).argmin().expand(cost.shape[:2])
        return rules[0][chosen], rules[1][chosen]


def _prompts(site: Site, rows: int) -> Int[Tensor, " r"]:
    """The length of each row's prompt; 0 where it began empty."""
    return site.state.get("prompt", torch.zeros(rows, dtype=torch.long))
