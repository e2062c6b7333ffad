"""Landmark tokens in a pretrained model: few weights are trained beside its own, then texts are read block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from saccade import __version__
from saccade.attach.calibration import Subject
from saccade.attach.engine import Place
from saccade.attach.gates import frozen
from saccade.attach.listening import listening
from saccade.attach.probe import Spot
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.errors import BadArtefact, CannotRun
from saccade.methods.mixers.landmark import is_landmark, with_landmarks

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
ROWS_AT_ONCE = 512  # queries that are read together
Turned = Callable[[Tensor, Tensor], Tensor]  # (x [b h n d], shifts [n]) -> x so many positions later


class Landmarks:
    """A model whose texts have a landmark after every block_tokens - 1 tokens, and whose attention is grouped by them.

    The model's weights stay. What learns are the landmark's embedding and, for each projection W of attention, a change
    of low rank: x W -> x W + x A B, B zero at first. Trained, a token reads few blocks of a text of any length.

    weights: float32, by name, [layers ...] but for the embedding; give them to an optimiser
    made: what was trained before; block_tokens and rank are then its own

    Raises:
        CannotRun: a model whose positions or projections are not known, or whose logits are capped.
        BadArtefact: it was made for a model of another shape.
    """

    def __init__(self, model: Any, block_tokens: int = 64, rank: int = 16, made: Artefact | None = None):
        self.subject = Subject(model)
        self.block_tokens = made.options["block_tokens"] if made else block_tokens
        spots = sorted(self.subject.found.sites, key=lambda spot: spot.place.layer)
        self.linears = [{name: getattr(spot.module, name, None) for name in PROJECTIONS} for spot in spots]
        reasons = []
        if any(not isinstance(x, torch.nn.Linear) for layer in self.linears for x in layer.values()):
            reasons.append(f"its attention has no {', '.join(PROJECTIONS)}")
        if any(spot.place.turn is None or spot.place.softcap for spot in spots):
            reasons.append("how it marks positions is not known, or its logits are capped")
        if reasons:
            raise CannotRun(f"train landmarks of {self.subject.name}", reasons, "Use a Llama-like model.")
        first = self._first(made.options["rank"] if made else rank)
        chosen = made.tensors if made else first
        if {n: x.shape for n, x in chosen.items()} != {n: x.shape for n, x in first.items()}:
            raise BadArtefact("landmarks", f"they are not of {self.subject.name}", "Train them for this model.")
        self.weights = {n: x.to(model.device, torch.float32).requires_grad_() for n, x in chosen.items()}

    def _first(self, rank: int) -> dict[str, Tensor]:
        """The landmark is the mean token; nothing is changed yet."""
        table = self.subject.model.get_input_embeddings().weight.detach()
        draw, out = rng.generator("landmarks"), {"landmark": table.float().mean(0)}
        for name, linear in self.linears[0].items():
            a = torch.randn(len(self.linears), linear.in_features, rank, generator=draw) * linear.in_features**-0.5
            out |= {f"{name}.a": a, f"{name}.b": torch.zeros(len(self.linears), rank, linear.out_features)}
        return out

    # --- what a text says -------------------------------------------------------------------------------------------

    def logits(self, ids: Int[Tensor, "b n"], read_blocks: int = 0, last: int = 0) -> Float[Tensor, "b m vocab"]:
        """Of every token but the first, or of the last so many, by what stands before it.

        read_blocks: blocks that each token reads beside its own; 0: all of them, where they are
        """
        model, size = self.subject.model, self.block_tokens
        marked = with_landmarks(ids, 0, size).to(model.device)
        mark = is_landmark(marked.shape[1], size).to(model.device)
        table = model.get_input_embeddings()(marked)
        inputs = torch.where(mark[:, None], self.weights["landmark"].to(table.dtype), table)
        before = (~mark).nonzero()[1:, 0] - 1
        with self._changed(read_blocks):
            return model(inputs_embeds=inputs, use_cache=False, logits_to_keep=before[-last:]).logits

    def step(self, ids: Int[Tensor, "b n"], answers: Bool[Tensor, "b n"]) -> float:
        """Adds up gradients of  nats per token + nats per token of the answers;  returns that loss."""
        with frozen(self.subject.model), torch.enable_grad():
            wanted = ids[:, 1:].to(self.subject.model.device)
            nats = cross_entropy(self.logits(ids).float().mT, wanted, reduction="none")
            loss = nats.mean()
            if answers.any():
                loss = loss + nats[answers[:, 1:].to(nats.device)].mean()
            loss.backward()
        return float(loss.detach())

    def artefact(self, data: str, figures: Mapping[str, Any]) -> Artefact:
        """The weights, for `Landmarks(model, made=...)` of the same model."""
        tensors = {n: x.detach().to("cpu", torch.bfloat16) for n, x in self.weights.items()}
        options = {"block_tokens": self.block_tokens, "rank": tensors["q_proj.a"].shape[-1]}
        subject = self.subject
        about = {"options": options, "data": data, "version": __version__, "figures": figures}
        return Artefact("landmark", tensors, subject.name, subject.fingerprint, **about)

    @contextlib.contextmanager
    def _changed(self, read_blocks: int) -> Iterator[None]:
        """The model with its projections changed and its attention grouped."""
        hooks = [
            linear.register_forward_hook(self._hook(name, i))
            for i, layer in enumerate(self.linears)
            for name, linear in layer.items()
        ]
        try:
            with listening(self.subject.model, self.subject.found, lambda spot: _Grouped(self, spot, read_blocks)):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, name: str, layer: int) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        def change(_: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            a, b = (self.weights[f"{name}.{part}"][layer] for part in "ab")
            return out + (given[0].to(a.dtype) @ a @ b).to(out.dtype)

        return change


class _Grouped:
    """One module's attention."""

    def __init__(self, landmarks: Landmarks, spot: Spot, read_blocks: int):
        self.size, self.read, self.place = landmarks.block_tokens, read_blocks, spot.place
        self.run = SimpleNamespace(title="landmarks")

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        if real is not None:
            raise CannotRun("read landmarks in padded rows", "blocks are counted from the start", "Give whole rows.")
        place: Place = self.place
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        if self.read:
            assert place.turn is not None, "refused before"
            return nearest(q, k, v, self.size, self.read, place.scale, place.turn)
        if torch.is_grad_enabled():
            return checkpoint(grouped, q, k, v, self.size, place.scale, use_reentrant=False)
        return grouped(q, k, v, self.size, place.scale)


# --- grouped softmax --------------------------------------------------------------------------------------------------


def grouped(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h n d"], v: Float[Tensor, "b h n d"], size: int, scale: float
) -> Float[Tensor, "b h n d"]:
    """Every token reads its own block and, through their landmarks, all earlier ones. The whole map is made."""
    wide, n = torch.promote_types(q.dtype, torch.float32), q.shape[2]
    q, k, values = (pad(x.to(wide), (0, 0, 0, -n % size)) for x in (q, k, v))
    logits = q @ k.mT * scale
    at = torch.arange(q.shape[2], device=q.device)
    mark = at % size == size - 1
    own = (at // size == at[:, None] // size) & (at <= at[:, None]) & ~mark
    gate = mark & (at // size < at[:, None] // size)
    share = logits.masked_fill(~(own | gate), -torch.inf).softmax(-1)
    inner = logits.unflatten(-1, (-1, size))[..., :-1].softmax(-1) * (share * gate)[..., mark, None]
    weights = share * own + pad(inner, (0, 1)).flatten(-2)
    return (weights @ values)[:, :, :n].to(v.dtype)


@torch.no_grad()
def nearest(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n d"],
    size: int,
    read: int,
    scale: float,
    turn: Turned,
) -> Float[Tensor, "b h n d"]:
    """Every token of every head reads its own block and the `read` earlier ones of largest landmarks, placed as if they
    were no farther than `read` + 1 blocks away: what `Landmark` does, for queries and keys that have positions."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, values = (x.to(wide) for x in (q, k, v))
    at = torch.arange(q.shape[2], device=q.device)
    inside = turn(k, -(at // size) * size)  # keys where they stand in their blocks
    blocks = [x[:, :, : len(at) // size * size].unflatten(2, (-1, size)) for x in (k, inside, values)]
    out = []
    for rows in at.split(ROWS_AT_ONCE):
        first = int(rows[0]) // size * size
        near = slice(first, int(rows[-1]) + 1)
        mine = at[near]
        own = (mine // size == rows[:, None] // size) & (mine <= rows[:, None]) & (mine % size < size - 1)
        logits = (q[:, :, rows] @ k[:, :, near].mT * scale).masked_fill(~own, -torch.inf)
        gates, said = _loaded(q[:, :, rows], rows // size, blocks, read, scale, turn)
        share = torch.cat([logits, gates], -1).softmax(-1)
        there, far = share.split([len(mine), gates.shape[-1]], -1)
        out.append(there @ values[:, :, near] + (far[..., None] * said).sum(-2))
    return torch.cat(out, 2).to(v.dtype)


def _loaded(
    q: Float[Tensor, "b h r d"], own: Int[Tensor, " r"], blocks: list[Tensor], read: int, scale: float, turn: Turned
) -> tuple[Float[Tensor, "b h r k"], Float[Tensor, "b h r k d"]]:
    """Of the blocks that each query loads: their gates, and what they say."""
    keys, inside, values = blocks  # [b h blocks size d]
    size, many = keys.shape[3], keys.shape[2]
    placed = torch.stack([turn(q, (slot - own) * size) for slot in range(1, read + 2)])
    behind = own[:, None] - torch.arange(many, device=q.device)
    close, distant = q @ keys[..., -1, :].mT, placed[-1] @ inside[..., -1, :].mT
    scores = torch.where(behind <= read + 1, close, distant).masked_fill(behind < 1, -torch.inf)
    best = scores.topk(min(read, many), -1).indices
    best = torch.where(scores.gather(-1, best) > -torch.inf, best, many).sort(-1).values
    real = best < many
    loaded = real.sum(-1)
    b, h = torch.arange(len(q), device=q.device)[:, None, None], torch.arange(q.shape[1], device=q.device)[:, None]
    gates, said = [], []
    for rank, (block, there) in enumerate(zip(best.unbind(-1), real.unbind(-1))):
        slot = (loaded - rank - (own - block <= read).long()).clamp(0, read)  # counted from 0
        asking = placed.gather(0, slot[None, ..., None].expand(1, *q.shape))[0]
        block = block.clamp(max=many - 1)
        logits = torch.einsum("bhrd,bhrld->bhrl", asking, inside[b, h, block]) * scale
        said.append(torch.einsum("bhrl,bhrld->bhrd", logits[..., :-1].softmax(-1), values[b, h, block][..., :-1, :]))
        gates.append(logits[..., -1].masked_fill(~there, -torch.inf))
    if not gates:
        return q.new_zeros(*q.shape[:3], 0), q.new_zeros(*q.shape[:3], 0, q.shape[-1])
    return torch.stack(gates, -1), torch.stack(said, -2)
