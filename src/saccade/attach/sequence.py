"""A text shared among processes: each runs the model over its own tokens, and in attention they meet.

"heads": tokens change for heads before attention and back after it, so that each process has the whole text for some of
the heads, and a method works there as under tensor parallelism. "ring": keys and values go round instead; for what is
seen by position, without a cache.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saccade import ops
from saccade.attach import compat
from saccade.attach.layer import SaccadeLayer
from saccade.attach.probe import Found
from saccade.core.errors import CannotRun
from saccade.core.layout import Layout
from saccade.core.method import Method, Probe
from saccade.core.selection import Spans, dense
from saccade.core.shard import Shard, uneven
from saccade.core.site import Site

if TYPE_CHECKING:
    from saccade.attach.engine import Engine
    from saccade.attach.run import Run

IGNORED = -100  # label of tokens that nothing is asked of


@dataclass(frozen=True)
class Sharing:
    """How, and among whom."""

    how: Literal["heads", "ring"] = "heads"
    group: Any = None  # of torch.distributed; None: all processes

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        """Processes in the group."""
        return dist.get_world_size(self.group)


SHARING: ContextVar[Sharing | None] = ContextVar("saccade_sharing", default=None)


def shared(model: Any, found: Found) -> Found:
    """What was found, as it is in one of the processes; with reasons why they cannot share this model's texts."""
    sharing = SHARING.get()
    if sharing is None or not found.sites:
        return found
    reasons, ranks = list(found.reasons), sharing.ranks
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if layers != len(found.sites):
        reasons.append(f"{len(found.sites)} of its {layers} layers are full attention; in others tokens would not meet")
    if found.shard.ranks > 1:
        reasons.append("processes share its heads already; share texts or heads, not both")
    if sharing.how == "ring":
        return dataclasses.replace(found, reasons=reasons, sharing=sharing)
    places = [spot.place for spot in found.sites]
    reasons += [reason for place in places for reason in uneven(place.heads, place.kv_heads, ranks)]
    fewer = {"heads": max(1, places[0].heads // ranks), "kv_heads": max(1, places[0].kv_heads // ranks)}
    sites = [dataclasses.replace(s, place=dataclasses.replace(s.place, **fewer)) for s in found.sites]
    shard = Shard(sharing.rank, ranks, sharing.group)
    return dataclasses.replace(found, reasons=reasons, sites=sites, shard=shard, sharing=sharing)


def refusals(methods: Sequence[Method], sharing: Sharing | None) -> list[str]:
    """Why these methods cannot work on a text that is shared so."""
    if sharing is None:
        return []
    probes = [m.card.name for m in methods if isinstance(m, Probe)]
    reasons = [f"{name} looks on at the model's own attention, which sees one part of the text" for name in probes]
    if sharing.how == "ring":
        for m in methods:
            if m.parts and not (m.by_position and "prefill" in m.parts):
                reasons.append(f"{m.card.name} chooses by what queries and keys hold, and in a ring no process has all"
                               " of them; share by heads")  # fmt: skip
    return reasons


class Text:
    """The text of the forward at hand, and the hooks that cut it up and put together what comes of it."""

    def __init__(self, run: Run, sharing: Sharing):
        self.run, self.sharing = run, sharing
        self.layout: Layout | None = None  # None: every process reads all of these few tokens
        self.real: Bool[Tensor, "b n"] | None = None
        self.labels: Tensor | None = None
        self.items: Tensor | float | None = None

    def hook(self, model: Any) -> list[Callable[[], None]]:
        """Into the model; what takes them out again."""
        decoder, keywords = model.get_decoder(), {"with_kwargs": True}
        return [
            model.register_forward_pre_hook(self._begin, **keywords).remove,
            decoder.register_forward_pre_hook(self._cut, **keywords).remove,
            decoder.register_forward_hook(self._join).remove,
            model.register_forward_hook(self._lose).remove,
        ]

    def before(self, engine: Engine) -> Any:
        """What stands in an attention module for its engine."""
        return InRing(self, engine) if self.ring else ByHeads(self, engine)

    @property
    def ring(self) -> bool:
        """Whether keys and values go round."""
        return self.sharing.how == "ring"

    # --- hooks ------------------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.labels, self.items = kwargs.pop("labels", None), kwargs.pop("num_items_in_batch", None)
        return args, kwargs

    def _cut(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = kwargs | dict(zip(inspect.signature(decoder.forward).parameters, args))
        name = "inputs_embeds" if kwargs.get("inputs_embeds") is not None else "input_ids"
        given = kwargs[name]
        rows, tokens = given.shape[:2]
        cache = next((kwargs[key] for key in compat.CACHES if kwargs.get(key) is not None), None)
        past = 0 if cache is None else cache.get_seq_length()
        self.real = self._padding(kwargs.get("attention_mask"), tokens)
        self.layout = self._laid_out(tokens, cache is not None or bool(kwargs.get("use_cache")))
        if self.layout is None:
            return (), kwargs
        positions = kwargs.get("position_ids")
        positions = torch.arange(past, past + tokens, device=given.device)[None] if positions is None else positions
        kwargs = kwargs | {name: self.layout.cut(given, 1), "position_ids": self.layout.cut(positions, -1)}
        kwargs["use_cache"] = False if self.ring else kwargs.get("use_cache")
        # says nothing but that the positions, which may leap, are of one text; padding is known to `real`
        kwargs["attention_mask"] = torch.ones(rows, past + self.layout.here, dtype=torch.long, device=given.device)
        return (), kwargs

    def _laid_out(self, tokens: int, cached: bool) -> Layout | None:
        """Who has which of the tokens to be read."""
        sharing, ring = self.sharing, self.ring
        if ring and cached:
            found = "keys and values that went round are kept nowhere"
            do = "Share by heads, or say use_cache=False."
            raise CannotRun(f"fill a cache under {self.run.title} in a ring", found, do)
        few = tokens < 2 * sharing.ranks
        if few and (ring or self.labels is not None):
            found = f"each of {sharing.ranks} processes needs two of them at least"
            raise CannotRun(f"share a text of {tokens} tokens", found, "Read it in one process.")
        if ring and self.real is not None:
            raise CannotRun("share padded rows in a ring", "each row would be cut elsewhere", "Share by heads.")
        return None if few else Layout(tokens, sharing.rank, sharing.ranks, ring, sharing.group)

    def _padding(self, mask: Any, tokens: int) -> Bool[Tensor, "b n"] | None:
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            found = "it was given a mask of its own; only padding masks [batch, tokens] are read"
            raise CannotRun(f"share a text under {self.run.title}", found, "")
        new = mask[:, -tokens:].bool()
        return None if bool(new.all()) else new

    def _join(self, decoder: nn.Module, args: tuple, output: Any) -> Any:
        """Of all tokens again, unless labels say that nobody asks for more than a loss."""
        if self.layout is None or self.labels is not None:
            return output
        if isinstance(output, tuple):
            return ops.all_tokens(output[0], self.layout), *output[1:]
        output.last_hidden_state = ops.all_tokens(output.last_hidden_state, self.layout)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(ops.all_tokens(x, self.layout) for x in output.hidden_states)
        return output

    def _lose(self, model: Any, args: tuple, output: Any) -> Any:
        """The loss of the whole text, in every process; its gradients average to those of the whole."""
        if self.labels is None:
            return output
        assert self.layout is not None, "few tokens with labels are refused"
        if getattr(output, "aux_loss", None) is not None:
            found = "the part of its loss that balances experts is of all tokens together"
            raise CannotRun(f"train under {self.run.title} on a shared text", found, "Say output_router_logits=False.")
        ahead = nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORED)
        counted = (ahead != IGNORED).sum() if self.items is None else self.items
        ahead = self.layout.cut(ahead, 1).contiguous()
        logits = output[0] if isinstance(output, tuple) else output.logits
        mine = model.loss_function(
            logits=logits, labels=ahead, shift_labels=ahead, vocab_size=logits.shape[-1], num_items_in_batch=counted
        )
        whole, ranks = mine.detach().clone(), self.sharing.ranks
        dist.all_reduce(whole, group=self.sharing.group)
        loss = mine * ranks + (whole - mine.detach() * ranks)
        if isinstance(output, tuple):
            return loss, *output
        output["loss"] = loss
        return output


class ByHeads:
    """Before an engine that has some of the heads: tokens come as heads, and go as tokens."""

    def __init__(self, text: Text, engine: Engine):
        self.text, self.engine, self.run = text, engine, engine.run

    def forward(
        self,
        layer: SaccadeLayer | None,
        q: Float[Tensor, "b h m d"],
        k: Float[Tensor, "b g m d"],
        v: Float[Tensor, "b g m d"],
        real: Tensor | None,
    ) -> Float[Tensor, "b h m d"]:
        """The module's share of the tokens, whatever the engine does."""
        layout = self.text.layout
        if layout is None:
            return self._few(layer, q, k, v)
        if layer is not None:
            layer.seen += layout.tokens - layout.here  # it was told of those here
        q, k, v = (ops.to_heads(x, layout) for x in (q, k, v))
        return ops.to_tokens(self.engine.forward(layer, q, k, v, self.text.real), layout)

    def _few(self, layer: SaccadeLayer | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """So few tokens, of a step, that every process has them all: each takes its heads."""
        if q.requires_grad:
            found = "so few are read by every process, which gives no gradients"
            raise CannotRun(f"train on a text of {q.shape[2]} tokens under {self.run.title}", found, "Give more.")
        shard = self.run.shard
        out = self.engine.forward(layer, *(shard.mine(x, 1) for x in (q, k, v)), self.text.real)
        return shard.gather(out, 1)


class InRing:
    """In an engine's place: attention by position over a text that nobody has the whole of. Keeps nothing."""

    def __init__(self, text: Text, engine: Engine):
        self.text, self.engine, self.run = text, engine, engine.run

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """Of the tokens here, over the whole text."""
        layout, place = self.text.layout, self.engine.place
        assert layout is not None and layer is None, "few tokens and caches are refused"
        options = {"scale": place.scale, "softcap": place.softcap}
        selection = self._selection(q, k, layout.tokens)
        self.run.begin(self.engine, SaccadeLayer(place.layer, self.engine))
        self.engine.counts.pending.append(selection)
        return ops.ring_attend(q, k, v, selection, layout, **options)

    def _selection(self, q: Tensor, k: Tensor, tokens: int) -> Spans:
        """What the method says of the whole text: it is shown tensors of its size that hold nothing."""
        owner, place = self.run.parts.get("prefill"), self.engine.place
        if owner is None:
            return dense(tokens, tokens)
        blank = [x.new_zeros(1).expand(*x.shape[:2], tokens, x.shape[3]) for x in (q, k)]
        site = Site(**dataclasses.asdict(place), stage="prefill", queries=tokens, keys=tokens, seen=tokens,
                    budget=self.run.budget, seed=self.run.seed, bytes_per_token=self.run.bytes_per_token)  # fmt: skip
        selection = owner.select(*blank, site)
        assert isinstance(selection, Spans), "what is by position is first tokens and a window"
        return selection
