"""ZipVL: each layer finds how many tokens matter; a prompt is read among those, and they are remembered better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import ops
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache, Pair
from saccade.core.selection import Buckets, Selection
from saccade.core.site import Seen, Site

BITS = (4, 2)  # of tokens that matter, and of the others


@dataclass(frozen=True)
class ZipVL(Cache):
    """Of each layer, only the tokens that matter attend and are attended to; they are stored in 4 bits, the rest in 2.

    Attention of some probe rows says what matters: a_j = sum_i A[i, j], over all heads. The fewest tokens that hold
    `mass_share` of it are p (eq. 6); which p, says a_j / (probe rows that see j), since first tokens are seen by more
    (eq. 7). The prompt's attention is dense among these, and nothing for the others, which go on in the residual
    stream. Keys are stored by channel, values by token after their channels were made alike:
    k ~ z_c + s_c Q,  v ~ u_c (z_t + s_t Q),  u_c = sqrt(max_t |v_tc|),  and new tokens by and by likewise.

    mass_share: tau, of the probes' attention that the tokens that matter hold; 1: all tokens matter
    unimportant: of the others in the cache: "pack" in 2 bits (the first version of the paper), or "drop" them at the
        end of the prompt, and pack nothing (the second)
    recent_probe_tokens, random_probe_tokens: rows that are looked at: the newest, and random ones before them
    unit_tokens: tokens after the prompt that are packed together; those that fill no unit yet are as they were computed
    prompt: its attention: "sparse", among the tokens that matter, or "dense": then the cache alone is compressed

    Raises:
        BadOption: a share outside (0, 1], no newest rows to look at, or units of nothing.
    Source: arXiv 2410.08584, section 4, equations 6 and 7 (first version); quantisers: ThisisBillhe/ZipCache.
    """

    card = Card(
        name="zipvl",
        title="ZipVL: Efficient Large Vision-Language Models with Dynamic Token Sparsification and KV Cache"
        " Compression",
        family="cache",
        paper="arXiv:2410.08584",
        year=2024,
        authors="He, Chen, Liu, Shao, Zhou, Zhang, Zhuang",
        summary="Each layer finds which tokens matter; prompts are read among those, the others kept in fewer bits.",
        equation="p = min{p : sum of the p largest a_j >= tau sum_j a_j},  T = top-p of a_j / (rows that see j)",
        budget="the most tokens of a prompt, or of a unit after it, that may matter, where mass_share asks for more;"
        " with mass_share=1 their number in every layer",
        departures=(
            "The authors gave no code. A budget bounds how many tokens matter; the paper has no such bound.",
            "a_j is divided by the true number of probe rows that see j. The authors' ZipCache divides by the number of"
            " all rows, with probes too.",
            "The least and largest of a token's values are those of one head, not of all heads together.",
            "A prompt in chunks: each has probes of its own, whose sums add up, and finds among all tokens so far what"
            " matters; that of the last chunk is what the cache goes by.",
            "Off CUDA devices the 4 and 2 bits are read by plain PyTorch, 1,024 tokens spelt out at a time: memory is"
            " saved, time is not.",
            "No trained model that sees could be had. With images the mechanics alone are tested, through generate, on"
            " a random tower before a language model (`models.tiny_llava`); all measured quality is of text.",
        ),
        lacks={
            "full-budget": "a budget is a bound; below it mass_share decides what is left out and rounded",
            "mask": "packed keys and values are rounded, which no mask says; unimportant='drop' equals its mask",
            "chunks": "the tokens that matter are found by the last ones of a prompt, or of a part of it",
            "causality": "which tokens of a prompt are read at all depends on its last ones",
            "keys": "tokens of a prompt that do not matter read nothing in that layer: their output is 0",
            "assisted": "guessed tokens are read together with the prompt, where they would count as prompt",
        },
    )
    marks = True

    mass_share: float = 0.975
    unimportant: Literal["pack", "drop"] = "pack"
    recent_probe_tokens: int = 64
    random_probe_tokens: int = 64
    unit_tokens: int = 100
    prompt: Literal["sparse", "dense"] = "sparse"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mass_share <= 1:
            found = "the tokens that matter hold more than 0 of the attention, and at most 1"
            raise BadOption(f"zipvl.mass_share={self.mass_share}", found, "Leave it away for 0.975.")
        if self.recent_probe_tokens < 1:
            raise BadOption("zipvl.recent_probe_tokens=0", "the last row sees all", "Leave it away for 64.")
        if self.unit_tokens < 1:
            raise BadOption("zipvl.unit_tokens=0", "a unit has one token or more", "Leave it away for 100.")

    @property
    def parts(self) -> tuple[str, ...]:
        cache = "pack" if self.unimportant == "pack" else "evict"
        return ("prefill", cache) if self.prompt == "sparse" else (cache,)

    def check(self, site: Site) -> list[str]:
        if self.unimportant == "drop":
            return []
        reasons, each = [], 8 // min(BITS)
        if site.head_size % each:
            reasons.append(f"{each} channels share a byte, and a head has {site.head_size}")
        if site.budget.unit == "bytes":
            reasons.append(f"it packs all tokens, and the budget {site.budget} is in bytes; give a fraction or tokens")
        return reasons

    def mark(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Bool[Tensor, "b k"]:
        options = {"scale": site.scale, "softcap": site.softcap}
        if site.stage == "decode":  # the newest token looks at its unit
            mass = site.shard.gather(ops.column_scores(q, k, causal=False, **options), 1).mean(1)
            return self._important(mass, mass, site)
        at = self._probes(site).to(q.device)
        mass = ops.column_scores(q.index_select(2, at - site.offset), k, at=at, **options)
        mass = site.shard.gather(mass, 1).mean(1)
        rows = len(at) - torch.searchsorted(at, torch.arange(site.keys, device=at.device))
        rows = rows.expand(len(q), -1).clone()
        if "mass" in site.state:  # of earlier parts of the prompt
            for total, before in ((mass, site.state["mass"]), (rows, site.state["rows"])):
                total[:, : before.shape[1]] += before
        site.state.update(mass=mass, rows=rows)
        return self._important(mass, mass / rows, site)

    def _probes(self, site: Site) -> Int[Tensor, " m"]:
        """Keys of the rows that are looked at, ascending: the newest, and others of the same forward."""
        recent = min(self.recent_probe_tokens, site.queries)
        earlier, draw = site.queries - recent, rng.generator("zipvl/probes", site.seed, site.layer, site.seen)
        random = torch.randperm(earlier, generator=draw)[: self.random_probe_tokens].sort().values
        return torch.cat([random, torch.arange(earlier, site.queries)]) + site.offset

    def _important(self, mass: Float[Tensor, "b k"], each: Float[Tensor, "b k"], site: Site) -> Bool[Tensor, "b k"]:
        """Top-p of `each`, the newest among them; p by the mass (eq. 6)."""
        b, n = mass.shape
        total = mass.double().sort(-1, descending=True).values.cumsum(-1)
        p = (total < self.mass_share * total[:, -1:]).sum(-1) + 1 if self.mass_share < 1 else mass.new_full((b,), n)
        p = p.clamp(max=site.budget.tokens(n, site.bytes_per_token))
        surest = each.nan_to_num(0.0).index_fill(-1, torch.tensor([n - 1], device=each.device), torch.inf)
        rank = surest.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return rank < p[:, None]

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        """Dense among the tokens that matter."""
        assert site.marks is not None, "the prompt is marked before it is read"
        asking = torch.where(site.marks[:, site.offset :], 0, -1).int()
        there = torch.where(site.marks, 0, 1).int()
        return Buckets(q_bucket=asking[:, None], k_bucket=there[:, None], queries=site.queries, keys=site.keys)

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        assert site.marks is not None, "the prompt was marked when it was read"
        return site.marks[:, None].float().expand(seen.keys.shape[:3])

    def allocate(self, scores: Float[Tensor, "b g k"], budget: Budget, site: Site) -> Int[Tensor, "b g"]:
        return (scores > 0).sum(-1)

    def pack_apart(self, marked: Pair, others: Pair) -> dict[str, Tensor]:
        each = ((bits, ops.pack_tokens(*pair, bits)) for bits, pair in zip(BITS, (marked, others)))
        return {f"{bits} {name}": x for bits, packed in each for name, x in vars(packed).items()}

    def read(
        self, q: Float[Tensor, "r s q d"], packed: Mapping[str, Tensor], *, scale: float, softcap: float | None
    ) -> tuple[Float[Tensor, "r s q d"], Float[Tensor, "r s q"]]:
        parts = [ops.attend_packed(q, x, scale=scale, softcap=softcap) for x in _by_bits(packed) if x.keys.shape[1]]
        return ops.merge_lse(*zip(*parts))

    def unpack(self, packed: Mapping[str, Tensor]) -> tuple[Float[Tensor, "r n d"], Float[Tensor, "r n d"]]:
        """Those in 4 bits first, then those in 2."""
        k, v = zip(*[ops.unpack_tokens(x) for x in _by_bits(packed) if x.keys.shape[1]])
        return torch.cat(k, 1), torch.cat(v, 1)


def _by_bits(packed: Mapping[str, Tensor]) -> list[ops.Packed]:
    """The columns, put together again."""
    named = [{name.split()[1]: x for name, x in packed.items() if name.startswith(f"{bits} ")} for bits in BITS]
    return [ops.Packed(**fields) for fields in named]
