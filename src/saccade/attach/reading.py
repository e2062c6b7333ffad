"""Which keys the queries after a prompt read, counted by their true positions, where a run is asked to note it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.record import LayerRecord
from saccade.core.selection import Selection
from saccade.core.site import Site

Note = Callable[[Selection], None]  # told what some queries after the prompt read


def noting(site: Site, note: Note) -> Site:
    """The same site, whose `attend` and `partial` tell what they are given to read."""

    def telling(compute: Callable[..., Any]) -> Callable[..., Any]:
        def told(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Any:
            note(selection)
            return compute(q, k, v, selection)

        return told

    return replace(site, attend=telling(site.attend), partial=telling(site.partial))


def note(
    record: LayerRecord, sequences: Sequence[int], position: Int[Tensor, "b g k"], heads: int, selection: Selection
) -> None:
    """Add what these queries read. `position` is that of each key of the selection, for every key/value head."""
    read = selection.mask().sum(-2).expand(len(sequences), heads, -1).cpu()
    position = position.expand(len(sequences), -1, -1).repeat_interleave(heads // position.shape[1], 1).long().cpu()
    for i, sequence in enumerate(sequences):
        old = record.reads.get(sequence, torch.zeros(heads, 0, dtype=torch.long))
        longer = pad(old, (0, max(0, int(position[i].max()) + 1 - old.shape[1])))
        record.reads[sequence] = longer.scatter_add(-1, position[i], read[i])
        record.readers[sequence] += selection.queries
