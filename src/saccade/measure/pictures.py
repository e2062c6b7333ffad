"""Maps of what every contestant of a finished run attends to: one text, one head, the same for all."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saccade import models, tasks
from saccade.core.errors import BadInput, SaccadeError
from saccade.measure.attended import Attended, Maps, Stretch, attended
from saccade.measure.cells import FULL
from saccade.measure.codes import mass_code, share_code
from saccade.measure.contestants import parse
from saccade.measure.runner import Event, Progress, unwatched
from saccade.measure.store import write_json

FILE = "maps.json"
SCHEMA = 1
TOKENS, LATER_TOKENS = 256, 12  # of the text, and of those the last, which are read one by one
NEAR = 3  # stretches of a text before a query that are near it
RULE = (
    "of the heads in the second half of the layers, the one that in full attention has most mass neither at the"
    " beginning nor near the query"
)


def pictures(
    folder: str | Path, model: str | Path | None = None, device: str | None = None, progress: Progress | None = None
) -> Path:
    """Let each contestant of a run read a text, and keep in the run's folder what it chose and where the mass lies.

    model: where the run's lies, if it was a folder or a file; device: None: that of the run
    Each at the budget that the run timed. One that cannot be drawn is kept with the reason.

    Raises:
        BadInput: the folder holds no finished run, or the run is of another model.
        ModelUnavailable: the model cannot be had.
    """
    folder, said = Path(folder), progress or unwatched
    run, summary = (_read(folder, name) for name in ("run.json", "summary.json"))
    net, tokenizer = models.load(_source(run, model), dtype=run["dtype"], device=device or run["device"])
    ids = _text(tokenizer, run["seed"])
    whole = attended(net, ids, FULL)
    head = furthest(whole.stretches[0].layers)
    made, without = [_picture(whole, head)], []
    field = _field(run, summary)
    for i, (label, budget) in enumerate(field):
        said(Event("start", f"{label} reads", i, len(field)))
        try:
            found = attended(net, ids, parse(label), budget, run["seed"], later_tokens=LATER_TOKENS)
            made.append(_picture(found, head))
        except SaccadeError as e:  # what cannot be drawn is shown as that
            without.append({"label": label, "budget": budget, "why": str(e)})
    said(Event("end", str(folder / FILE), len(field), len(field)))
    words = {"schema": SCHEMA, "text": "Moby-Dick", "tokens": ids.shape[1], "layer": head[0], "head": head[1]}
    write_json(folder / FILE, words | {"rule": RULE, "pictures": made, "without": without})
    return folder / FILE


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        asked, found = f"maps of the run in {folder}", f"its {name} cannot be read ({e})"
        raise BadInput(asked, found, "Finish the run: saccade compare --out DIR") from e


def _source(run: Mapping[str, Any], model: str | Path | None) -> str:
    """What loads the model of a run; of a folder the run knows only the name."""
    given = str(model) if model is not None else run["model"]
    name = Path(given).name if Path(given).exists() else given
    if name != run["model"]:
        raise BadInput(f"maps by {name}", f"the run is of {run['model']}", "Give the model of the run.")
    return given


def _text(tokenizer: Any, seed: int) -> Tensor:
    sample = tasks.get("loss").samples(tokenizer, TOKENS, 1, seed)[0]
    return torch.cat([sample.context, sample.continuation], 1)


def _field(run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All but `full` that were measured, each at the budget that was timed, or at the only one that it has."""
    budgets: dict[str, list[str]] = {}
    for row in summary["rows"]:
        if row["method"] != FULL:
            budgets.setdefault(row["label"], []).append(row["budget"])
    return [(x, run["timed_budget"] if run["timed_budget"] in there else there[0]) for x, there in budgets.items()]


def furthest(layers: Sequence[Maps]) -> tuple[int, int]:
    """Layer and head of `RULE`. The beginning is the first stretch of the text, as it is divided for the maps."""
    first = len(layers) // 2  # some methods leave the first ones dense
    far = torch.stack([_far(maps.mass) for maps in layers[first:]])
    layer, head = divmod(int(far.argmax()), far.shape[1])
    return first + layer, head


def _far(mass: Tensor) -> Tensor:
    """[h r c] -> [h]: what lies below the band of `NEAR` stretches and right of the first."""
    there = torch.ones(mass.shape[1:], dtype=torch.bool).tril(-NEAR - 1)
    there[:, 0] = False
    return torch.where(there, mass, 0.0).sum((-2, -1))


def _picture(found: Attended, head: tuple[int, int]) -> dict[str, Any]:
    """Bytes of the head's maps, and the shares of this head and of all."""
    stretches = [_stretch(stretch, *head) for stretch in found.stretches]
    return {"label": found.label, "budget": found.budget, "stretches": stretches}


def _stretch(stretch: Stretch, layer: int, head: int) -> dict[str, Any]:
    maps = stretch.layers[layer]
    chosen, mass = maps.chosen[head].tolist(), maps.mass[head].tolist()
    return {
        "stage": stretch.stage,
        "first": stretch.first,
        "queries": stretch.queries,
        "density": round(stretch.density, 4),
        "covered": round(stretch.covered, 4),
        "density_here": round(float(maps.density[head]), 4),
        "covered_here": round(float(maps.covered[head]), 4),
        "shape": list(maps.chosen[head].shape),
        "chosen": _packed([[share_code(x) for x in row] for row in chosen]),
        "mass": _packed([[mass_code(x, c) for x, c in zip(*rows)] for rows in zip(mass, chosen)]),
    }


def _packed(rows: Sequence[Sequence[int]]) -> str:
    """Bytes as text."""
    return base64.b64encode(bytes(code for row in rows for code in row)).decode()
