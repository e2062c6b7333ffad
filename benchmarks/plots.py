"""Pictures of what the benchmarks of a CUDA device found, as static SVG in docs/img.

    python benchmarks/plots.py                      # from benchmarks/results
    python benchmarks/plots.py FILES --to FOLDER

attend.svg: shares of the fastest dense kernel. decode.svg: microseconds of one step of attention. prefill.svg and
step.svg: a whole model. Where there is no file for one, it is not drawn. No GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu import RESULTS, Entry, File, entries, read, short
from svg import INK, MUTED, Look, Panel, Series, picture

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
from saccade.report.figures import COLOURS  # noqa: E402

IMAGES = ROOT / "docs" / "img"
BLUE, RED, GREEN, PINK, ORANGE = COLOURS[:5]
FORMS = ("circle", "square", "diamond", "triangle", "cross")
BACK_ENDS = {
    "triton": ("own Triton", Look(BLUE)),
    "flex": ("FlexAttention", Look(RED, "square")),
    "fa4": ("flash-attn-4", Look(GREEN, "diamond")),
}
DENSE = {"fa3": "FlashAttention-3", "fa4": "flash-attn-4", "cudnn": "cuDNN", "flash": "PyTorch's flash"}
STEPS = {  # how a row of gpu_decode.py begins: label, colour, form
    "decode dense": ("dense", INK, "circle"),
    "decode gather": ("gather 4,096", BLUE, "square"),
    "sparse step": ("sparse step, choosing too", RED, "diamond"),
    "decode int8": ("int8", GREEN, "triangle"),
    "decode int4": ("int4", ORANGE, "cross"),
}
PLAIN = {
    "full": Look(INK, ""),
    "full:attached": Look(MUTED, "", dash="6 3"),
    "fa3": Look(INK, "", dash="2 3"),
    "cudnn": Look(MUTED, "", dash="2 3"),
    "sdpa": Look(MUTED, "", dash="2 3"),
}


def ticks(values: Sequence[float], told: Callable[[float], str]) -> list[tuple[float, str]]:
    """Of the values that there are."""
    return [(v, told(v)) for v in sorted(set(values))]


def lengths(values: Sequence[int]) -> list[tuple[float, str]]:
    """Of tokens."""
    return ticks(values, lambda v: short(int(v)))


# --- attention ------------------------------------------------------------------------------------------------------


def attend(files: Sequence[File]) -> str | None:
    """Share of the fastest dense kernel against density; a panel for each length, and for backward."""
    groups: dict[tuple[bool, int], list[tuple[float, dict]]] = defaultdict(list)
    for entry in entries(files, "attend"):
        found = re.fullmatch(r"blocks 128 ([\d.]+)( backward)?", entry.row["case"])
        if found:
            groups[bool(found[2]), entry.row["tokens"]].append((float(found[1]), entry.row))
    panels = [share_panel(back, tokens, sorted(rows, key=lambda r: r[0]))
              for (back, tokens), rows in sorted(groups.items())]  # fmt: skip
    top = max((y for p in panels for s in p.series for _, y in s.points), default=1.0)
    panels = [dataclasses.replace(p, top=max(top, 1.0)) for p in panels]
    return picture("Share of the fastest dense kernel", panels, 3) if panels else None


def share_panel(back: bool, tokens: int, rows: list[tuple[float, dict]]) -> Panel:
    """Of one length."""
    series = []
    for name, (label, look) in BACK_ENDS.items():
        points = [(density, row[name]["share"]) for density, row in rows if "share" in row.get(name, {})]
        series.append(Series(label, look, points))
    for label, name, colour in (("goal, own Triton", "goal", BLUE), ("goal, best back end", "goal_best", GREEN)):
        points = [(density, row[name]) for density, row in rows if row.get(name)]
        series.append(Series(label, Look(colour, "dash", line=False), points))
    title = f"{'backward' if back else 'forward'}, {short(tokens)} (dense: {DENSE[rows[0][1]['dense']]})"
    values = [0.05, 0.1, 0.25, *(density for density, _ in rows)]
    return Panel(title, "density: share of the causal blocks", "share of dense TFLOP/s", ticks(values, "{:g}".format),
                 [s for s in series if s.points], log=False, level=(1.0, "fastest dense kernel", Look(INK, "")))


# --- decoding -------------------------------------------------------------------------------------------------------


def decode(files: Sequence[File]) -> str | None:
    """Microseconds against context; a panel for each number of sequences that dense was measured with."""
    points: dict[tuple[int, str, bool], list[tuple[float, float]]] = defaultdict(list)
    for entry in entries(files, "decode"):
        found = re.fullmatch(r"(.*?) (\d+) x (?:(\d+) of )?(\d+)", entry.row[0]["row"])
        if not found or found[1] not in STEPS:
            continue
        batch, context = int(found[2]), int(found[4])
        by_torch = [r["microseconds"] for r in entry.row if r["by"].startswith("torch") and r["microseconds"]]
        ours = [r["microseconds"] for r in entry.row if r["by"] == "triton" and r["microseconds"]]
        for torch, times in ((False, ours), (True, by_torch)):
            if times:
                points[batch, found[1], torch].append((context, min(times)))
    batches = sorted({batch for batch, kind, _ in points if kind == "decode dense"})
    panels = [step_panel(batch, points) for batch in batches]
    return picture("Microseconds of attention of one step", panels, 2) if panels else None


def step_panel(batch: int, points: dict[tuple[int, str, bool], list[tuple[float, float]]]) -> Panel:
    """Of one number of sequences: ours, and PyTorch's hollow."""
    series = []
    for torch, (kind, (label, colour, form)) in itertools.product((False, True), STEPS.items()):
        look = Look(colour, form, hollow=torch, dash="4 3" if torch else "")
        found = sorted(points.get((batch, kind, torch), []))
        series.append(Series(f"{label}, PyTorch" if torch else label, look, found))
    series = [s for s in series if s.points]
    known = [x for s in series for x, _ in s.points]
    title = "one sequence" if batch == 1 else f"{batch} sequences"
    return Panel(title, "context, tokens", "attention of one step, µs", lengths(known), series, values=True)


# --- the whole model ------------------------------------------------------------------------------------------------


def looks(found: Sequence[Entry]) -> dict[str, Look]:
    """The same method looks the same in both pictures."""
    names = sorted({named(e.row) for e in found} - {*PLAIN})
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(FORMS))
    return PLAIN | {name: Look(colour, form) for name, (colour, form) in zip(names, pairs)}


def named(row: dict) -> str:
    """A method with its budget."""
    return row["method"] if row["method"] in PLAIN else f"{row['method']}@{row['budget']}"


def model_panel(title: str, x: str, y: str, found: Sequence[tuple[str, int, float]], how: dict[str, Look]) -> Panel:
    """From (method, tokens, figure)."""
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for method, tokens, value in found:
        lines[method].append((tokens, value))
    order = sorted(lines, key=list(how).index)
    series = [Series(method, how[method], sorted(lines[method])) for method in order]
    return Panel(title, x, y, lengths([tokens for _, tokens, _ in found]), series)


def prefill(files: Sequence[File]) -> str | None:
    """Seconds of a layer against length: fewer layers than the model has are run at some lengths."""
    known = entries(files, "model")
    rows = [e.row for e in known if e.row["part"] == "prefill"]
    panels = []
    for name, title in (("seconds", "whole prefill"), ("attention", "its attention, choosing included")):
        found = [(named(r), r["tokens"], 1000 * statistics.median(r["figures"][name]) / r["layers"])
                 for r in rows if r["figures"].get(name)]  # fmt: skip
        if name == "attention":
            found += [(kernel, r["tokens"], 1000 * statistics.median(times) / r["layers"])
                      for r in rows if r["method"] == "dense kernels" for kernel, times in r["figures"].items()]
        if found:
            panels.append(model_panel(title, "prompt, tokens", "ms per layer", found, looks(known)))
    return picture("Prefill of a whole model", panels, 2) if panels else None


WAYS = {"eager": "as shipped", "replayed": "with graph_tokens", "graph": "as a CUDA graph"}


def step(files: Sequence[File]) -> str | None:
    """Milliseconds of a step of 32 layers against context; panels for the batch, as shipped and in a graph."""
    known = entries(files, "model")
    rows = [e.row for e in known if e.row["part"] == "decode"]
    panels = []
    for batch, (name, title) in itertools.product(sorted({r["batch"] for r in rows}), WAYS.items()):
        found = []
        for row in (r for r in rows if r["batch"] == batch):
            times = row["figures"].get(f"{name} of32") or (row["figures"].get(name) if row["layers"] == 32 else None)
            if times:
                found.append((named(row), row["tokens"], 1000 * statistics.median(times)))
        if found:
            who = "one sequence" if batch == 1 else f"{batch} sequences"
            panels.append(model_panel(f"{who}, {title}", "context, tokens", "one step, ms", found, looks(known)))
    return picture("A step of decoding of a whole model", panels, 2) if panels else None


PICTURES = {"attend.svg": attend, "decode.svg": decode, "prefill.svg": prefill, "step.svg": step}


def drawn(files: Sequence[File]) -> dict[str, str]:
    """name -> SVG, of those that there is something for."""
    made = {name: draw(files) for name, draw in PICTURES.items()}
    return {name: text for name, text in made.items() if text is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[RESULTS], help="files or folders of results")
    parser.add_argument("--to", type=Path, default=IMAGES, metavar="FOLDER")
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    for name, text in drawn(read(args.files)).items():
        (args.to / name).write_text(text, encoding="utf-8")
        print(args.to / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
