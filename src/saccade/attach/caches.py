"""Whole caches, for who decodes many sequences together: join them, drop rows, keep the beginning of a prompt.

Rows of a batch have padding on their left. `slots` are places along a row, padding included.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.attach import compat
from saccade.attach.layer import SaccadeLayer
from saccade.core.method import Cache, Decode

if TYPE_CHECKING:
    from saccade.attach.run import Run


def why_not_joined(run: Run | None, cache: Any) -> list[str]:
    """Why caches like this one cannot be joined; [] means that they can. `run` is None where nothing is attached."""
    reasons = [
        f"layer {i} keeps its tokens in a {type(layer).__name__}"
        for i, layer in enumerate(cache.layers)
        if not _growing(layer)
    ]
    reader = run and run.parts.get("decode")
    if isinstance(reader, Decode) and reader.reread_tokens:
        reasons.append(f"{reader.card.name} reads tokens again, each sequence at a time of its own")
    return reasons


def why_not_continued(run: Run | None, cache: Any) -> list[str]:
    """Why the beginning of one prompt cannot serve another; [] means that it can."""
    odd = sorted({type(x).__name__ for x in cache.layers if not (_ours(x) or compat.is_plain_layer(x))})
    reasons = [f"the tokens in a {name} cannot be taken back" for name in odd] + _whole(run)
    evictor = run and run.parts.get("evict")
    if isinstance(evictor, Cache) and evictor.tallies:
        name = evictor.card.name
        reasons.append(f"{name} keeps sums beside its keys, to which later tokens of that prompt have added")
    return reasons


def why_not_in_pieces(run: Run | None, cache: Any) -> list[str]:
    """Why a prompt must be read in one forward; [] means that several leave the same, told how many tokens it has."""
    odd = sorted({type(x).__name__ for x in cache.layers if not _growing(x)})
    return [f"a {name} does not take a prompt in pieces" for name in odd] + _whole(run, foretold=True)


def _whole(run: Run | None, foretold: bool = False) -> list[str]:
    """What reads a prompt as a whole, and why; `foretold`: though its length were told."""
    parts = run.parts.items() if run else ()
    readers = [m for part, m in parts if part in ("prefill", "decode") and not (foretold and m.foretold)]
    cards = [m.card for m in readers if "chunks" in m.card.lacks]
    return list(dict.fromkeys(f"{card.name} reads a prompt as a whole: {card.lacks['chunks']}" for card in cards))


def _growing(layer: Any) -> bool:
    return _ours(layer) or compat.is_plain_layer(layer) or compat.is_sliding_layer(layer)


def _ours(layer: Any) -> bool:
    return isinstance(layer, SaccadeLayer)


def pads(cache: Any) -> bool:
    """Whether shorter rows of a joined cache take as much memory as the longest."""
    return not all(map(_ours, cache.layers))


def observed_tokens(run: Run | None) -> int:
    """How many of the last prompt tokens must be read anew, since a method looks at their queries: one at least."""
    return max([1, *(getattr(m, "observe_tokens", 0) for m in (run.parts.values() if run else ()))])


def take_in(cache: Any, others: Sequence[Any]) -> None:
    """The rows of other caches join behind those of `cache`; the others are empty afterwards."""
    slots = max(c.get_seq_length() for c in (cache, *others))
    for mine, *theirs in zip(cache.layers, *(c.layers for c in others)):
        if isinstance(mine, SaccadeLayer):
            mine.take_in(theirs)
            continue
        kept = min(slots, mine.sliding_window - 1) if compat.is_sliding_layer(mine) else slots
        for name in ("keys", "values"):
            setattr(mine, name, torch.cat([_padded(getattr(x, name), kept) for x in (mine, *theirs)]))
        _count(mine, slots)
    for other in others:
        forget(other)


def _padded(tokens: Tensor, slots: int) -> Tensor:
    return pad(tokens, (0, 0, slots - tokens.shape[2], 0))


def _count(layer: Any, slots: int) -> None:
    if compat.is_sliding_layer(layer):
        layer.cumulative_length = slots


def keep_rows(cache: Any, rows: Sequence[int], padding: int) -> None:
    """Keep some rows, without the first `padding` slots, which are padding in all of them."""
    slots = cache.get_seq_length() - padding
    for layer in cache.layers:
        device = layer.device
        layer.batch_select_indices(torch.tensor(rows, device=device))
        if isinstance(layer, SaccadeLayer):
            layer.seen = slots
            continue
        kept = min(slots, layer.sliding_window - 1) if compat.is_sliding_layer(layer) else slots
        layer.keys, layer.values = (x[:, :, x.shape[2] - kept :] for x in (layer.keys, layer.values))
        _count(layer, slots)


def beginning(cache: Any, tokens: int) -> Any:
    """A copy of the first tokens of a prompt, to go on with; memory is shared, and nobody writes there.

    The prompt is one sequence, and methods have not met its end: under `Run.prompt()`.
    """
    made = copy.copy(cache)
    made.layers = [_beginning(layer, tokens) for layer in cache.layers]
    return made


def _beginning(layer: Any, tokens: int) -> Any:
    if isinstance(layer, SaccadeLayer):
        return layer.beginning(tokens)
    made = copy.copy(layer)
    made.keys, made.values = layer.keys[:, :, :tokens], layer.values[:, :, :tokens]
    return made


def resume(cache: Any) -> None:
    """From here on `Run.prompt()` and `Run.record` are about this copy of a beginning."""
    for layer in cache.layers:
        if isinstance(layer, SaccadeLayer) and layer.engine is not None:
            layer.engine.run.begin(layer.engine, layer)


def forget(cache: Any) -> None:
    """Let go of all that it holds, though somebody may still hold the cache."""
    for layer in cache.layers:
        layer.reset()
