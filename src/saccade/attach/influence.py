"""What the loss of a text loses with each block of keys, to first order: gradients say it, and no map is kept.

An entry A_ij of a head's map is taken out and its row made to sum to one again. With o_i = sum_j A_ij v_j and the
gradient d_i = dL/do_i the loss then moves by  E_ij = A_ij (d_i.o_i - d_i.v_j) / (1 - A_ij).
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from saccade import ops
from saccade.attach.gates import Progress, frozen, recall_text
from saccade.attach.listening import listening
from saccade.attach.probe import Spot
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.paths import cache_dir
from saccade.core.selection import Spans, causal_mask, dense

if TYPE_CHECKING:
    from saccade.attach.calibration import Subject
    from saccade.methods.sparse.moa import MoA

SHARES = (0.25, 0.5, 1.0)  # of a sample: the lengths that are profiled
ROWS = 256  # queries whose entries are held at a time
LEAST = 1e-4  # what is taken for 1 - A_ij where a key has all of a row's attention
PROSE = 4  # the last 1/PROSE of the prose counts in the loss


@dataclass(frozen=True)
class Text:
    """Token ids, and what each token's loss weighs."""

    ids: Int[Tensor, "1 n"]
    weight: Float[Tensor, "1 n"]


class Influence:
    """Profiles a model on recall texts made of samples; the last sample, if there are several, is held out.

    Each of the others is cut to a quarter, a half and all of its length. After every sample what is known is put into
    the cache folder, so that a profile that broke off goes on where it was.
    """

    def __init__(self, subject: Subject, recipe: MoA, samples: Sequence[Tensor]):
        self.subject, self.recipe = subject, recipe
        self.samples = list(samples[:-1]) or list(samples)
        self.held_out = samples[-1] if len(samples) > 1 else None
        shortest = min(sample.shape[1] for sample in samples)
        self.lengths = tuple(max(1, int(shortest * share)) for share in SHARES)
        self.maps: dict[int, Tensor] = {}  # of the text at work: layer -> [h nb nb]

    def profile(self, progress: Progress | None = None) -> list[Float[Tensor, "layers h nb nb"]]:
        """|mean over samples of the influence of key blocks on query blocks|, for each length."""
        done, sums = self._resume()
        total = len(self.samples) * len(self.lengths)
        for index in range(done, len(self.samples)):
            for at, length in enumerate(self.lengths):
                found = self.of_text(self.text(self.samples[index][:, :length], index))
                sums[at] = sums[at] + found / len(self.samples) if index else found / len(self.samples)
                if progress is not None:
                    progress(index * len(self.lengths) + at + 1, total, f"influence in {length} tokens")
            if index + 1 < len(self.samples):
                self._put_by(index + 1, sums)
        for suffix in (".safetensors", ".json"):
            self._file.with_suffix(suffix).unlink(missing_ok=True)
        return [total.abs() for total in sums]

    def text(self, sample: Int[Tensor, "1 n"], index: int) -> Text:
        """Pass keys in as many tokens as the sample has, asked for at the end; in longer texts more of them."""
        n, recipe = sample.shape[1], self.recipe
        keys = max(1, math.ceil(recipe.answer_keys * n / self.lengths[-1]))
        draw = rng.python("influence/texts", 0, index, n)
        ids, answers = recall_text(self.subject.tokenizer, sample, draw, keys, recipe.answer_key_words, shortest=1.0)
        prose = torch.zeros_like(answers)
        end = int(answers[0].nonzero()[0])  # the first question comes a few tokens before: they count as prose
        prose[:, end - end // PROSE : end] = True
        weight = answers / answers.sum() + recipe.prose_weight * prose / prose.sum().clamp(min=1)
        return Text(ids, weight)

    def of_text(self, text: Text) -> Float[Tensor, "layers h nb nb"]:
        """Influence of key blocks on query blocks in one text."""
        self.maps.clear()
        model, found = self.subject.model, self.subject.found
        with frozen(model), listening(model, found, lambda spot: _Gradients(self, spot)), torch.enable_grad():
            self._loss(text).backward()
        maps = torch.stack([self.maps[layer] for layer in range(self.subject.layers)])
        self.maps.clear()
        return maps

    @torch.no_grad()
    def loss(self, spans: Int[Tensor, "layers g"], sinks: int) -> float:
        """Of the text that was held out, where every head sees its first tokens and a window, `spans` together."""
        assert self.held_out is not None, "one sample leaves none to hold out"
        text = self.text(self.held_out[:, : self.lengths[-1]], len(self.samples))
        with listening(self.subject.model, self.subject.found, lambda spot: _Spanned(spot, spans, sinks)):
            return float(self._loss(text))

    def _loss(self, text: Text) -> Tensor:
        device = self.subject.model.device
        ids, weight = text.ids.to(device), text.weight.to(device)
        first = max(1, int(text.weight[0].nonzero()[0]))  # no logits before it: at a large vocabulary most of the cost
        keep = ids.shape[1] - first + 1
        logits = self.subject.model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (cross_entropy(logits, ids[0, first:], reduction="none") * weight[0, first:]).sum()

    # --- going on after an interruption -----------------------------------------------------------------------------

    @property
    def _file(self) -> Any:
        digest = hashlib.sha256(repr((self.recipe.profile_options, self.lengths)).encode())
        for sample in self.samples:
            digest.update(sample.cpu().to(torch.int64).numpy().tobytes())
        return cache_dir("profiles", "moa", f"{self.subject.fingerprint}-{digest.hexdigest()[:12]}")

    def _put_by(self, done: int, sums: Sequence[Tensor]) -> None:
        tensors = {f"sum{i}": total for i, total in enumerate(sums)}
        Artefact("moa", tensors, self.subject.name, self.subject.fingerprint, figures={"done": done}).save(self._file)

    def _resume(self) -> tuple[int, list[Tensor]]:
        """How many samples were profiled before, and the sums over them."""
        if not self._file.with_suffix(".json").exists():
            return 0, [torch.zeros(())] * len(self.lengths)
        half = Artefact.load(self._file)
        return half.figures["done"], [half.tensors[f"sum{i}"] for i in range(len(self.lengths))]


class _Gradients:
    """Dense attention of one module whose backward pass looks at what each entry is worth."""

    def __init__(self, influence: Influence, spot: Spot):
        self.influence, self.place, self.run = influence, spot.place, SimpleNamespace(title="calibrate")

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        n = q.shape[2]
        out, lse = ops.attend(q, k, v, dense(n, n), scale=self.place.scale, softcap=self.place.softcap)
        if not out.requires_grad:  # the first layer: no weight asks for a gradient, so the graph begins here
            out = out.detach().requires_grad_()
        out.register_hook(functools.partial(self._see, *(x.detach() for x in (q, k, v, out, lse))))
        return out

    def _see(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor) -> None:
        block = self.influence.recipe.block_tokens
        options = {"block": block, "scale": self.place.scale, "softcap": self.place.softcap}
        self.influence.maps[self.place.layer] = block_influence(q, k, v, out, lse, grad, **options).cpu()


class _Spanned:
    """Attention of one module over each head's first tokens and window."""

    def __init__(self, spot: Spot, spans: Int[Tensor, "layers g"], sinks: int):
        self.place, self.run = spot.place, SimpleNamespace(title="calibrate")
        self.spans = spans[spot.place.layer].repeat_interleave(spot.place.heads // spot.place.kv_heads)
        self.sinks = self.spans.clamp(max=sinks)

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        sinks, window = (x.to(q.device) for x in (self.sinks, self.spans - self.sinks + 1))
        some = Spans(sinks=sinks, window=window, queries=q.shape[2], keys=k.shape[2])
        return ops.attend(q, k, v, some, scale=self.place.scale, softcap=self.place.softcap)[0]


@torch.no_grad()
def block_influence(
    q: Float[Tensor, "1 h n d"], k: Float[Tensor, "1 g n d"], v: Float[Tensor, "1 g n d"],
    out: Float[Tensor, "1 h n d"], lse: Float[Tensor, "1 h n"], grad: Float[Tensor, "1 h n d"], *,
    block: int, scale: float, softcap: float | None,
) -> Float[Tensor, "h nb nb"]:  # fmt: skip
    """E summed over blocks of queries and keys. A row of one key is left with nothing without it: E = -A d.v."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).to(lse.dtype) for x in (k, v))
    q, out, grad = (x.to(lse.dtype) for x in (q, out, grad))
    n, rows = q.shape[2], max(1, ROWS // block) * block
    kept, seen = (grad * out).sum(-1, keepdim=True), causal_mask(n, n, q.device)
    parts = []
    for start in range(0, n, rows):
        some = slice(start, start + rows)
        logits = (q[:, :, some] @ k.mT) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        a = torch.exp(logits - lse[:, :, some, None]).masked_fill(~seen[some], 0.0)
        worth = grad[:, :, some] @ v.mT
        e = a * (kept[:, :, some] - worth) / (1 - a).clamp(min=LEAST)
        if start == 0:
            e[:, :, 0, 0] = -a[:, :, 0, 0] * worth[:, :, 0, 0]
        e = pad(e[0], (0, -n % block, 0, -e.shape[2] % block))
        parts.append(e.unflatten(2, (-1, block)).unflatten(1, (-1, block)).sum((2, 4)))
    return torch.cat(parts, 1)
