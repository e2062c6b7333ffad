"""RazorAttention: heads that find earlier tokens remember everything, the others a window and the mean of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from saccade import ops
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Cache
from saccade.core.selection import dense
from saccade.core.site import Seen, Site

COPIES = 4  # of the random tokens in a text that heads are ranked on


@dataclass(frozen=True)
class RazorAttention(Cache):
    """Retrieval heads keep the whole text, local heads sinks, a window, and one key that stands for all the others.

    Heads are ranked on random tokens repeated four times, i at the same place of a later copy: echo heads look at the
    same token earlier, A[i, i - mK], induction heads at the one after it, A[i, i - mK + 1]. In a local head the N
    dropped tokens become their mean k', v', counted N times:
    o = (N e^(q.k') v' + sum_kept e^(q.k_j) v_j) / (N e^(q.k') + sum_kept e^(q.k_j)),  which is + log N in the softmax.

    induction_share, echo_share: of all key/value heads of the model, that are whole: the best by either score
    sink_tokens: first tokens that a local head keeps; fewer where the budget is smaller
    window_tokens: least window of a local head: where the budget does not pay for it, fewer heads are whole. What the
        whole heads leave of the budget widens it
    compensation: what stands for the dropped keys: their mean "count" times, the mean as "one" key, or nothing ("none")
    policy: of tokens after the prompt: "append" keeps them all; in local heads "roll" moves the window on by blocks of
        `fold_tokens` and takes what leaves it into the mean, so that such a head holds a window and a block at most
    fold_tokens: of a block under policy "roll"
    probe_tokens: random tokens that are repeated; the text for ranking has four times as many and must fit the model

    Raises:
        BadOption: a share outside [0, 1], an empty block, or fewer than two random tokens.
    Source: arXiv 2407.15891, section 3; mindspore-lab/golden-stick, sequence_compress/razor_attention.
    """

    card = Card(
        name="razor-attention",
        title="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
        family="cache",
        paper="arXiv:2407.15891",
        year=2024,
        authors="Tang, Lin, Lin, Han, Hong, Yao, Wang",
        official="mindspore-lab/golden-stick",
        licence_of_official="Apache-2.0",
        summary="Heads that find earlier tokens keep everything, others a window and one key for all that goes.",
        equation="o = softmax([q.K_kept, q.mean(K_dropped) + log N]) [V_kept, mean(V_dropped)]",
        usual=True,
        budget="mean keys per head over the whole model at the end of the prompt, the compensation keys among them; it"
        " sets the windows",
        calibrated=True,
        departures=(
            "The window of local heads follows from the budget, and so may the number of whole heads; the paper takes a"
            " fifth of the text, at least 4,000 tokens, and drops nothing from shorter texts.",
            "The compensation key is part of the budget, and the last to be given up: a budget of one key is the mean.",
            "Ranked on texts of 500 random tokens, one for each sample, not one of 2,500, so that four copies fit small"
            " models; drawn from the tokens of the samples, which are neither special nor unused.",
            "The score of a key/value head is the largest of its query heads.",
            "golden-stick counts the compensation key once (compensation='one' does that), matches heads by the value"
            " of their score and takes echo heads of the first layer only; here as the paper says.",
            "policy='roll' is ours: the paper does not say what becomes of tokens after the prompt.",
            "The paper's bound for models with ALiBi is not part of this.",
        ),
        lacks={
            "mask": "a query also sees the mean of what was dropped, which no mask over the text's keys says;"
            " compensation='none' equals its mask",
            "chunks": "what is dropped at the end of a prompt is seen by later tokens as a mean; a prompt given in"
            " chunks is cut at its end and agrees",
            "gqa": "the number of whole heads is rounded over all key/value heads: of two copies of a head, one may be"
            " whole",
        },
    )

    induction_share: float = 0.14
    echo_share: float = 0.01
    sink_tokens: int = 4
    window_tokens: int = 64
    compensation: Literal["count", "one", "none"] = "count"
    policy: Literal["append", "roll"] = "append"
    fold_tokens: int = 64
    probe_tokens: int = 500

    def __post_init__(self):
        super().__post_init__()
        for name, share in {"induction_share": self.induction_share, "echo_share": self.echo_share}.items():
            if not 0 <= share <= 1:
                raise BadOption(f"razor-attention.{name}={share}", "it takes a share from 0 to 1", "Leave it away.")
        if self.fold_tokens < 1:
            raise BadOption("razor-attention.fold_tokens=0", "it takes at least 1", "Leave it away for 64.")
        if self.probe_tokens < 2:
            found = "one token has no other after it, and it takes at least 2"
            raise BadOption(f"razor-attention.probe_tokens={self.probe_tokens}", found, "Leave it away for 500.")

    @property
    def rolling(self) -> bool:
        """Under "roll" windows move on as tokens come."""
        return self.policy == "roll"

    @property
    def merges(self) -> bool:
        return self.compensation != "none"

    def check(self, site: Site) -> list[str]:
        if self.artefact is None:
            return ["no heads were ranked for this model: saccade calibrate razor-attention"]
        found, here = tuple(self.artefact.tensors["induction"].shape), (site.layers, site.all_kv_heads)
        if found != here:
            return [f"its scores are for {found[0]} layers of {found[1]} key/value heads, here: {here[0]} of {here[1]}"]
        return []

    def score(self, seen: Seen, site: Site) -> Float[Tensor, "b g k"]:
        b, g, k, _ = seen.keys.shape
        site.state["prompt"] = torch.full((b,), site.seen, device=seen.keys.device)
        sinks, start, full = self._split(site.seen, site)
        position = torch.arange(k, device=seen.keys.device)
        stays = (position < sinks) | (position >= start) | full.to(position.device)[:, None]
        return stays.float().expand(b, g, k)

    def allocate(self, scores: Float[Tensor, "b g k"], budget: Budget, site: Site) -> Int[Tensor, "b g"]:
        return (scores > 0).sum(-1)

    def visible(
        self, q_position: Int[Tensor, "r q"], k_position: Int[Tensor, "r k"], head: Int[Tensor, " r"], site: Site
    ) -> Bool[Tensor, "r q k"] | None:
        if self.policy == "append":
            return None
        out = torch.ones(*q_position.shape, k_position.shape[1], dtype=torch.bool, device=head.device)
        prompt = site.state.get("prompt", torch.zeros_like(head))  # a row that began empty has no prompt
        for n in prompt.unique().tolist():
            sinks, start, full = self._split(n, site)
            rows = prompt == n
            moved = (q_position[rows] - n) // self.fold_tokens * self.fold_tokens
            near = (k_position[rows, None] < sinks) | (k_position[rows, None] >= start + moved[..., None])
            out[rows] = near | full.to(head.device)[head[rows], None, None]
        return out

    def reach(self, queries: Sequence[int], site: Site) -> list[list[tuple[int, int]]] | None:
        if self.policy == "append":
            return None
        prompts = site.state["prompt"].tolist() if "prompt" in site.state else [0] * len(queries)
        out = []
        for t, n in zip(queries, prompts):
            sinks, start, full = self._split(n, site)
            near = t - start - (t - n) // self.fold_tokens * self.fold_tokens
            out.append([(sinks, t if whole else near) for whole in full.tolist()])
        return out

    def _split(self, prompt: int, site: Site) -> tuple[int, int, Bool[Tensor, " g"]]:
        """Sinks of a local head, its first key after the gap (the compensation key), and which heads of this layer are
        whole.

        Of H heads, F are whole: the best, as many as asked for if each of the others can have its least c keys:
        F <= H (budget - c) / (n - c). The others share what is left:  (H budget - F n) / (H - F)  keys each.
        """
        need, held = self.need(), site.budget.tokens(prompt, site.bytes_per_token)
        if held >= prompt:
            return 0, 0, torch.ones(site.kv_heads, dtype=torch.bool)
        heads, mean = need.numel(), int(self.merges)
        least = min(max(1, self.sink_tokens + mean + self.window_tokens), held)
        whole = min(int((need < 1).sum()), heads * (held - least) // (prompt - least))
        room = (heads * held - whole * prompt) // (heads - whole)
        sinks = min(self.sink_tokens, room - mean)
        rank = need.flatten().argsort(stable=True).argsort().view_as(need)
        return sinks, prompt - (room - sinks), site.shard.mine(rank[site.layer] < whole)

    def need(self) -> Float[Tensor, "layers g"]:
        """Below 1 for heads to be whole, lowest first: the rank by a score over how many are asked for, by the better
        of the two."""
        assert self.artefact is not None, "check refuses to run without scores"
        need = torch.full_like(self.artefact.tensors["induction"], torch.inf)
        for name, share in (("induction", self.induction_share), ("echo", self.echo_share)):
            if share:
                score = self.artefact.tensors[name]
                rank = score.flatten().argsort(descending=True, stable=True).argsort().view_as(score)
                need = torch.minimum(need, rank / max(1, round(share * score.numel())))
        return need

    def merge(
        self, k: Float[Tensor, "r k d"], v: Float[Tensor, "r k d"], k_position: Int[Tensor, "r k"],
        stays: Bool[Tensor, "r k"],
    ) -> tuple[Float[Tensor, "r k d"], Float[Tensor, "r k d"]]:  # fmt: skip
        """The key after those that go becomes the mean of them and itself; an earlier mean counts as it should."""
        gone = ~stays
        heir = stays & pad(gone[:, :-1], (1, 0))
        tokens = k_position.diff(dim=1, prepend=torch.full_like(k_position[:, :1], -1))
        count = tokens * (gone | heir)
        return _merged(k, heir, count), _merged(v, heir, count)

    def stands_for(
        self, k_position: Int[Tensor, "r k"], stays: Bool[Tensor, "r k"] | None
    ) -> tuple[Int[Tensor, "r 1"], Int[Tensor, "r 1"]] | None:
        """A compensation key lies at the end of a gap, and stands for the tokens that the gap lacks and itself."""
        if self.compensation == "one":
            return None
        before = k_position if stays is None else torch.where(stays, k_position, -1).cummax(-1).values
        tokens = k_position - pad(before[:, :-1], (1, 0), value=-1)
        tokens = tokens if stays is None else torch.where(stays, tokens, 1)
        most = tokens.max(-1, keepdim=True)
        return most.indices, most.values

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        """Scores of each key/value head on random tokens from the samples; each sample's first token begins a text."""
        words, places = model.words(samples), {spot.place.layer: spot.place for spot in model.found.sites}
        texts = [torch.cat([row[:, :1].cpu(), self._text(words, i)], 1) for i, row in enumerate(samples)]
        sums = {name: torch.zeros(model.layers, model.heads) for name in ("induction", "echo")}
        for step, (layer, q, k, v) in enumerate(model.capture_qkv(texts), 1):
            options = {"scale": places[layer].scale, "softcap": places[layer].softcap}
            lse = ops.attend(q, k, v, dense(q.shape[2], q.shape[2]), **options)[1]
            for name, ahead in (("induction", 1), ("echo", 0)):
                found = looking_back(q[:, :, 1:], k[:, :, 1:], lse[:, :, 1:], self.probe_tokens, ahead, **options)
                sums[name][layer] += found[0].cpu() / len(texts)
            if progress is not None and layer == model.layers - 1:
                progress(step // model.layers, len(texts), "ranking heads")
        scores = {name: x.unflatten(1, (model.kv_heads, -1)).amax(-1) for name, x in sums.items()}
        best = {f"best {name}": [round(s, 4) for s in x.flatten().sort(descending=True).values[:20].tolist()]
                for name, x in scores.items()}  # fmt: skip
        return model.artefact(self, scores, samples, best)

    def _text(self, words: Int[Tensor, " m"], index: int) -> Int[Tensor, "1 n"]:
        """Random tokens, each as seldom as can be, four times over."""
        draw = rng.generator("razor-attention/text", 0, index)
        laps = [words[torch.randperm(len(words), generator=draw)] for _ in range(-(-self.probe_tokens // len(words)))]
        return torch.cat(laps)[: self.probe_tokens].repeat(COPIES)[None]


def looking_back(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"], lse: Float[Tensor, "b h n"], period: int, ahead: int, *,
    scale: float, softcap: float | None,
) -> Float[Tensor, "b h"]:  # fmt: skip
    """mean over i >= period of  sum_m A[i, i - m period + ahead],  m = 1, 2, ... as far as the text goes; from the
    log-sum-exp of the rows, so that no map is made."""
    k, n = k.repeat_interleave(q.shape[1] // k.shape[1], 1), q.shape[2]
    total = torch.zeros(lse.shape[:2], dtype=lse.dtype, device=lse.device)
    for back in range(period, n, period):
        logits = (q[:, :, back:] * k[:, :, ahead : n - back + ahead]).sum(-1, dtype=lse.dtype) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        total += torch.exp(logits - lse[:, :, back:]).sum(-1)
    return total / (n - period)


def _merged(x: Float[Tensor, "r k d"], heir: Bool[Tensor, "r k"], count: Int[Tensor, "r k"]) -> Tensor:
    """x, and where `heir` says so the mean of the row's keys, each `count` times, in float32 or better."""
    kind = torch.promote_types(x.dtype, torch.float32)
    total = count.to(kind)[:, None] @ x.to(kind)
    mean = total / count.sum(-1).clamp(min=1)[:, None, None]
    return torch.where(heir[..., None], mean.to(x.dtype), x)
