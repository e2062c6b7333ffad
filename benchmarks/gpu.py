"""All benchmarks of a CUDA device in one command, and one table of what they found.

    python benchmarks/gpu.py                                  # all four, files into benchmarks/results
    python benchmarks/gpu.py --only attend decode --quick     # some, fewer and shorter cases; not for the page
    python benchmarks/gpu.py --show benchmarks/results        # the table from stored files; no GPU is needed
    python benchmarks/gpu.py --show benchmarks/results --markdown docs/speed-gpu.md    # fill the page with it

Each benchmark is a process of its own: where one fails, the others run all the same, and the exit code is 1. Where
stored files hold a case twice, the later date counts (the name says it), then the file named later; what a case is
compared with is always of its own run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Script:
    """A benchmark: `json` is its option for the file; `usual` and `quick` what it is given beside."""

    json: str
    usual: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


SCRIPTS = {
    "attend": Script("--json", ("--peers", "--ahead", "4000000"), ("--rounds", "3", "--tokens", "32768")),
    "grid": Script("--json", (), ("--rounds", "3")),
    "decode": Script("--out", (), ("--only", "gather", "step", "small")),
    "model": Script("--json", (), ("--rounds", "1", "--steps", "4", "--lengths", "16384", "--no-profile")),
}
MARKS = {"special": "attend", "pairs": "grid", "copy": "decode", "shape": "model"}  # what only its files have

# of gpu_grid.py, which takes them from here; the files of the others hold their goals
GRID_GOALS = {"triton": 0.45}
GRID_REFERENCE = 680.0  # TFLOP/s of FlashAttention-3 on an H200

OURS = "triton"
BACK_ENDS = ("triton", "fa4", "flex")
PLAIN = ("full", "full:attached", "dense kernels")
DENSE = {"attention": ("attention", "cudnn", "fa3", "sdpa")}  # figures of PLAIN that another is compared with

WEIGHTS = (
    "Every step reads all weights, whatever the method: 16 GB in 32 layers, about as many bytes as the dense cache of"
    " this row (17 GB)."
)
HALF = (
    "Half of the heads keep the whole cache, and all weights are read: with 69 and 16 GB of the 137 and 16 GB of dense,"
    " at most 1.8 times fewer bytes in 32 layers."
)
LATENCY = "So few bytes that the start and end of the kernels weigh as much as the bandwidth."
TILE_64 = (
    "A tile of 64 queries does 64 flop for each byte of keys and values that it reads: where the second-level cache"
    " helps little, the bandwidth of the memory allows about 0.40 of dense."
)
# a case of the table, or how it begins -> what bounds it. Only what is known: a row that is missing here says so.
HOST = (
    "An eager step waits for the host, whose Python takes longer than the kernels (graph): what that is a layer, beside"
    " transformers' own, is the difference of the two `eager` times over the layers."
)
REPLAYED = (
    "What bounds the step in a graph bounds it (the row below); captures, and attention over the newest tokens apart,"
    " come on top of both it and the dense step."
)
BACKWARD = (
    "The kernel for dK and dV holds two sums and two tiles of scores at once and spills 120 bytes a thread: its tensor"
    " pipe is 55 % busy, dQ's 69 % (profiles/misses-ncu); their products are seven, where a kernel for all three has"
    " five."
)
GATHERED = (
    "Keys are read one by one through pointers (the copy engine of Hopper takes rows that follow on one another), with"
    " 255 registers a thread: two programs of four warps a multiprocessor; at 128k the tensor pipe is 42 % busy, what"
    " reads the second-level cache 61 % (profiles/attend-ncu)."
)
SCORED = (
    "Of 1.7 ms a layer, float32 products of the labels of every query head and the passes over them take 1.0, choosing"
    " among 131,072 scores of each 0.25, and attention 0.3 (profiles/chosen-128k); group=max makes one list for the"
    " query heads of a key/value head, and is the row below."
)
REASONS = {
    "blocks 128 0.10, 32k": (
        "A program has 26 steps, and its beginning and end are not behind another's; the tensor pipe was 62 % busy at"
        " 0.25 before the last change (profiles/blocks-32k-ncu)."
    ),
    "blocks 128 0.25, 128k": (
        "The tensor pipe is 66 % busy, memory 45 %: one program of 168 registers a thread and 180 KB fills a"
        " multiprocessor, and its three warps a scheduler issue in 40 % of the cycles (profiles/attend-ncu)."
    ),
    "blocks 128 0.10 backward": BACKWARD,
    "blocks 128 0.25 backward": BACKWARD,
    "blocks 64 0.10 per head": "Heads with lists of their own make no tile of 128 rows: the plain kernel takes them.",
    "lines 1024+1024": (
        "The lists are made first, and the host asks once whether heads share them; then "
        + GATHERED[0].lower()
        + GATHERED[1:]
    ),
    "lines 4096+4096": GATHERED,
    "gather 512 of 64-query blocks per head": TILE_64,
    "sinks 4 + window": "Each step has both bounds of the window in its mask.",
    "decode double-sparsity@0.0625 128k x 8": SCORED,
    "column_scores": "It is within a hundredth.",
    "window 80 x 80 of 256 x 256": (
        "The form that Triton specialises by warp was wrong on grids of two and three axes; the plain one leaves the"
        " tensor pipe 64 % idle: 222 registers a thread, one program of eight warps a multiprocessor"
        " (profiles/attend-ncu); boxes touch 1.23 times the pairs that the windows hold."
    ),
    "decode gather 1 x 4096 of 131072": LATENCY,
    "page scores 1 x 131072": LATENCY,
    "sparse step 1 x 4096 of 131072": (
        "Choosing costs more than attending: bounds, top-k and attention follow each other, each with so few bytes that"
        " start and end weigh as much as the bandwidth."
    ),
    "decode int4": (
        "The work for each byte, taking two numbers out of it: a multiprocessor issues in 55 % of its cycles, memory is"
        " 42 % busy, with four programs of four warps, by their registers, to hide one behind the other"
        " (profiles/misses-ncu)."
    ),
    "choose 128 of 2048 blocks of 64": "Blocks of half the size have four times as many scores to rank.",
    "decode snapkv@0.12 16k x 8, graph": WEIGHTS,
    "decode duo-attention@0.5 128k x 1, graph": WEIGHTS,
    "decode duo-attention@0.5 128k x 8, graph": HALF,
    "decode tidaldecode@0.152 128k x 8, graph": (
        "One layer of eight reads every key twice: for its scores, and to attend (profiles/chosen-128k). With the parts"
        " per layer scaled to 32 layers the step is 2.02 times less."
    ),
    "decode zipvl@0.6 128k x 8, graph": (
        "Taking codes out of bytes costs more than reading them. Measured before programs became one warp, which took"
        " less time in a run of the kernel alone."
    ),
}


# --- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """What a benchmark wrote."""

    path: Path
    kind: str  # of SCRIPTS
    data: dict[str, Any]

    @property
    def device(self) -> str:
        """Its name."""
        environment = self.data.get("environment", {})
        return self.data.get("device") or environment.get("device_name") or environment.get("device", "unknown")

    @property
    def date(self) -> str:
        """As its name says; empty if it does not."""
        return day(self.path)


def day(path: Path) -> str:
    """As a file's name says; empty if it does not."""
    found = re.search(r"\d{4}-\d\d-\d\d", path.name)
    return found[0] if found else ""


@dataclass(frozen=True)
class Entry:
    """A case in the file that counts: for decode the rows of all implementations, for the others one row."""

    file: File
    row: Any


def read(paths: Sequence[Path]) -> list[File]:
    """Files, or those of folders that gpu_*.json names (not those of --quick), the earliest first."""
    found = []
    for path in paths:
        inside = [p for p in sorted(path.glob("gpu_*.json")) if not p.stem.endswith("-quick")]
        if path.is_dir() and not inside:
            raise SystemExit(f"There is no gpu_*.json in {path}: name the files, or another folder.")
        for file in inside or [path]:
            data = json.loads(file.read_text(encoding="utf-8"))
            kind = next((kind for mark, kind in MARKS.items() if mark in data), None)
            if kind is None:
                raise SystemExit(f"{file} is not of gpu_attend.py, gpu_grid.py, gpu_decode.py or gpu_model.py.")
            found.append(File(file, kind, data))
    return sorted(found, key=lambda f: f.date)


def entries(files: Sequence[File], kind: str) -> list[Entry]:
    """Each case once, of the latest file."""
    found: dict[Any, Entry] = {}
    for file in files:
        for key, row in keyed(file) if file.kind == kind else ():
            found[file.device, key] = Entry(file, row)
    return list(found.values())


def keyed(file: File) -> Iterator[tuple[Any, Any]]:
    """(what makes a case the same, what was found)."""
    rows = file.data["rows"]
    if file.kind == "attend":
        yield from (((row["case"], row["tokens"]), row) for row in rows)
    elif file.kind == "grid":
        yield from (((name,), {"name": name} | row) for name, row in rows.items())
    elif file.kind == "decode":
        for name in dict.fromkeys(row["row"] for row in rows):
            yield (name,), [row for row in rows if row["row"] == name]
    else:
        yield from ((tuple(row[n] for n in ("part", "method", "budget", "tokens", "batch")), row) for row in rows)


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """A row of the table. `met` is None where there is no goal; `note`: what the file says of a row that misses."""

    case: str
    goal: str = ""
    reached: str = ""
    other: str = ""
    goal_best: str = ""
    reached_best: str = ""
    met: bool | None = None
    met_best: bool | None = None
    device: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """Of both goals."""
        said = {None: None, True: "yes", False: "no"}
        own, best = said[self.met], said[self.met_best]
        return (own or best or "") if None in (own, best) or own == best else f"own {own}, best {best}"

    @property
    def missed(self) -> bool:
        """One of its goals at least."""
        return False in (self.met, self.met_best)


def short(tokens: int) -> str:
    """131072 as 128k."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def attend_line(entry: Entry) -> Line:
    """Shares of the fastest dense kernel."""
    row = entry.row
    shares = {name: row[name]["share"] for name in BACK_ENDS if "share" in row.get(name, {})}
    out = Line(f"{row['case']}, {short(row['tokens'])}", f"{row['goal']:.2f}")
    out.reached, out.met = told_share(row.get(OURS, {})), shares.get(OURS, 0) >= row["goal"]
    if OURS in shares:
        out.reached = f"{out.reached[:-1]}, {row['dense']} {row['dense_tflops']:.0f})"
    others = {name: share for name, share in shares.items() if name != OURS}
    if others:
        name = max(others, key=others.__getitem__)
        out.other = f"{name} {told_share(row[name])}"
    if row.get("goal_best") and shares:
        name = max(shares, key=shares.__getitem__)
        out.goal_best, out.met_best = f"{row['goal_best']:.2f}", shares[name] >= row["goal_best"]
        out.reached_best = f"{name} {shares[name]:.3f}"
    of_cudnn = row["dense_kernels"].get("cudnn", {}).get("tflops")
    if out.case.count("backward") and row["dense"] != "cudnn" and of_cudnn:  # goals of backward were set on cuDNN's
        told = ", ".join(f"{name} {row[name]['tflops'] / of_cudnn:.3f}" for name in shares)
        out.note = f"Of cuDNN's dense backward, on which the goals were set: {told}."
    return out


def told_share(one: dict[str, Any]) -> str:
    """Of one kernel."""
    if "share" in one:
        return f"{one['share']:.3f} ({one['tflops']:.0f} TFLOP/s)"
    return "WRONG" if "wrong" in one else "failed" if "failed" in one else "not run"


def grid_lines(found: Sequence[Entry]) -> Iterator[Line]:
    """Of ours; FlexAttention beside, for which the order of tokens is not counted."""
    rows = {(e.file.device, e.row["name"]): with_share(e.row) for e in found}
    for (device, name), row in rows.items():
        if not name.startswith(OURS) and name not in GRID_GOALS:
            continue
        out = Line(f"window 80 x 80 of 256 x 256, {name}", reached=told_share(row), device=device)
        if name in GRID_GOALS:
            out.goal, out.met = f"{GRID_GOALS[name]:.2f}", row.get("share", 0) >= GRID_GOALS[name]
        if (peer := rows.get((device, "flex, order apart"))) and "backward" not in name:
            out.other = f"flex, order apart {told_share(peer)}"
        yield out


def with_share(row: dict[str, Any]) -> dict[str, Any]:
    """A row of gpu_grid.py, of the reference."""
    return row | ({"share": row["tflops"] / GRID_REFERENCE} if "tflops" in row else {})


def decode_line(entry: Entry) -> Line:
    """Microseconds, or shares of the copy bandwidth where the goal is one; PyTorch's best beside."""
    rows = {row["by"]: row for row in entry.row}
    peers = [row for name, row in rows.items() if name.startswith("torch") and row["microseconds"]]
    best = min(peers, key=lambda row: row["microseconds"], default=None)
    ours = rows.get(OURS)
    if ours is None:
        return Line(entry.row[0]["row"], reached="no kernel", other=f"{best['by']} {told_time(best)}" if best else "")
    goal, by_bytes = ours["goal"], ours["goal"].startswith("rb")
    out = Line(ours["row"], goal.replace("us", "µs"), told_time(ours, by_bytes), met=met_by(ours, best))
    out.other = "" if best is None else f"{best['by']} {told_time(best, by_bytes)}"
    clean, clean_best = (r and r | {"microseconds": r["clean"], "rb": r["rb_clean"]} for r in (ours, best))
    if met_by(clean, clean_best):
        out.note = f"It is met where the second-level cache holds only what was read: {told_time(clean, by_bytes)}."
    return out


def met_by(ours: dict[str, Any], best: dict[str, Any] | None) -> bool | None:
    """Whether a row of gpu_decode.py meets its goal, written as "16 us", "rb 0.72" or "within 3 % of the best"."""
    goal, took = ours["goal"], ours["microseconds"]
    if not goal or took is None:
        return False if goal else None
    if goal.startswith("rb"):
        return ours["rb"] >= float(goal.split()[1])
    if goal.endswith(" us"):
        return took <= float(goal.split()[0])
    return best is None or took <= (1 + float(goal.split()[1]) / 100) * best["microseconds"]


def told_time(row: dict[str, Any], by_bytes: bool = False) -> str:
    """Of one implementation."""
    if not row["microseconds"]:
        return row["note"] or "not run"
    time = f"{row['microseconds']:.1f} µs"
    return f"rb {row['rb']:.3f} ({time})" if by_bytes else time


def model_lines(entry: Entry) -> Iterator[Line]:
    """Times less than the fastest dense, and shares of its bytes."""
    row = entry.row
    if row["method"] in PLAIN:
        return
    step = tuple(name for name in ("eager", "replayed", "graph") if name in row["figures"])
    goals = {name: told.partition(":")[0] for name, told in row["goals"].items()}
    goals |= dict.fromkeys(step, goals.get("step", ""))
    place = f" x {row['batch']}" if row["part"] == "decode" else ""
    case = f"{row['part']} {row['method']}@{row['budget']} {short(row['tokens'])}{place}"
    for name in (*step, "cache") if step else ("attention", "seconds"):
        out = Line(f"{case}, {name} [{row['layers']} layers]", goals.get(name, ""))
        ratio = row["against"].get(name)
        out.reached = "not measured" if ratio is None else told_figure(row, name) + f" ({ratio:.3f})"
        dense = fastest(entry, name)
        out.other = f"{dense[0]} {told_figure(dense[1], dense[2])}" if dense else ""
        if out.goal:
            sign, value = out.goal.split()
            out.met = ratio is not None and (ratio <= float(value) if sign == "<=" else ratio >= float(value))
        if name == "eager" and row["figures"].get("graph"):
            out.note = f"The same step as a CUDA graph, without the host: {told_figure(row, 'graph')}."
        yield out


def fastest(entry: Entry, name: str) -> tuple[str, dict[str, Any], str] | None:
    """(who, row, figure) of the dense that a figure is compared with."""
    row, found = entry.row, []
    for other in entry.file.data["rows"]:
        same = all(other[n] == row[n] for n in ("part", "tokens", "batch", "layers"))
        for figure in DENSE.get(name, (name,)) if same and other["method"] in PLAIN else ():
            value = figure_of(other, figure)
            if value is not None:
                who = figure if other["method"] == "dense kernels" else other["method"]
                found.append((value, who, other, figure))
    return min(found, key=lambda one: one[0])[1:] if found else None


def figure_of(row: dict[str, Any], name: str) -> float | None:
    """Median of seconds, or bytes."""
    if name in row["bytes"]:
        return row["bytes"][name]
    return statistics.median(row["figures"][name]) if row["figures"].get(name) else None


def told_figure(row: dict[str, Any], name: str) -> str:
    """With its unit."""
    value = figure_of(row, name)
    assert value is not None
    return f"{value / 2**30:.2f} GiB" if name in row["bytes"] else f"{1000 * value:.1f} ms"


def table(files: Sequence[File]) -> list[Line]:
    """Every row."""
    out = []
    for kind, make in (("attend", attend_line), ("decode", decode_line)):
        for entry in entries(files, kind):
            out.append(make(entry))
            out[-1].device = entry.file.device
        out += grid_lines(entries(files, "grid")) if kind == "attend" else []
    for entry in sorted(entries(files, "model"), key=lambda e: (-len(e.row["part"]), e.row["tokens"], e.row["batch"])):
        for line in model_lines(entry):
            line.device = entry.file.device
            out.append(line)
    if len({line.device for line in out}) > 1:
        for line in out:
            line.case += f", {line.device}"
    return out


HEADS = ("case", "goal", "reached, our Triton", "best other", "goal, best", "reached, best", "met")


def cells(line: Line) -> tuple[str, ...]:
    """In the order of HEADS."""
    return (
        line.case, line.goal, line.reached, line.other, line.goal_best, line.reached_best, line.verdict
    )  # fmt: skip


def text(files: Sequence[File]) -> str:
    """For a terminal."""
    found = table(files)
    rows = [HEADS, *map(cells, found)]
    wide = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    body = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide)).rstrip() for row in rows]
    return "\n".join(filter(None, [*body, count(found), remarks(files)]))


def count(found: Sequence[Line]) -> str:
    """How many goals are met."""
    goals = [met for line in found for met in (line.met, line.met_best) if met is not None]
    return f"{sum(goals)} of {len(goals)} goals are met."


def remarks(files: Sequence[File]) -> str:
    """What must be known to read the shares."""
    rows = [e.row for e in entries(files, "attend") if "fa3" not in e.row["dense_kernels"]]
    without = [f"{row['case']}, {short(row['tokens'])}" for row in rows if "backward" not in row["case"]]
    if not without:
        return ""
    return (
        "FlashAttention-3, on which the goals of attention were set, was not installed in the run of these rows: "
        + "; ".join(without) + ". Their shares are of a slower kernel, and higher for it."
    )  # fmt: skip


# --- for the page ---------------------------------------------------------------------------------------------------


# name in docs/img -> the benchmark, a part of its rows, and what is to be seen
PICTURES = {
    "attend.svg": (
        "attend", None, "Attention over blocks of 128: share of the fastest dense kernel, per pair computed, against"
        " density. Short strokes are goals.",
    ),
    "decode.svg": (
        "decode", None, "Attention of one decoding step: microseconds against context. Hollow: PyTorch on the same"
        " data.",
    ),
    "prefill.svg": (
        "model", "prefill", "A whole model, prefill: time over the number of layers, since fewer are run where the"
        " prompt is long. Right: the part of attention, and dense kernels alone.",
    ),
    "step.svg": (
        "model", "decode", "A whole model, decoding: a step of 32 layers against context; scaled to them where fewer"
        " are run, which needs the step's graph.",
    ),
}  # fmt: skip


def pictures_part(files: Sequence[File]) -> str:
    """Those that benchmarks/plots.py draws from these files."""
    known = {(entry.file.kind, entry.row["part"]) for entry in entries(files, "model")}
    known |= {(file.kind, None) for file in files}
    shown = [(name, told) for name, (kind, part, told) in PICTURES.items() if (kind, part) in known]
    return "\n\n".join(f"{told}\n\n![{told.partition(':')[0]}](img/{name})" for name, told in shown)


def goals_part(files: Sequence[File]) -> str:
    """The rows that have goals, in Markdown, and where they come from."""
    found = [line for line in table(files) if line.goal or line.goal_best]
    if not found:
        return "No file with goals is there yet."
    rows = [HEADS, ("---",) * len(HEADS), *map(cells, found)]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    parts = (body, count(found), remarks(files), f"From {', '.join(map(source, files))}.")
    return "\n\n".join(filter(None, parts))


def source(file: File) -> str:
    """A link where the file is in the repository."""
    where = f"{file.path.stem} ({file.device}, torch {told_torch(file)})"
    return f"[{where}](../benchmarks/results/{file.path.name})" if file.path.resolve().parent == RESULTS else where


def told_torch(file: File) -> str:
    """Its version."""
    return file.data.get("torch") or file.data.get("environment", {}).get("torch", "unknown")


def misses_part(files: Sequence[File]) -> str:
    """A line for each row that misses a goal."""
    missed = [line for line in table(files) if line.missed]
    return "\n".join(f"- **{line.case}**: {reason(line)}" for line in missed) or "None misses its goals."


def reason(line: Line) -> str:
    """What is known."""
    why = next((why for key, why in REASONS.items() if line.case.startswith(key)), HOST * (", eager" in line.case))
    why = why or REPLAYED * (", replayed" in line.case)
    return " ".join(filter(None, (why, line.note))) or "Not established."


def filled(page: str, files: Sequence[File]) -> str:
    """The page with what stands between `<!-- goals -->` and `<!-- /goals -->`, and the like, made anew."""
    for name, make in (("pictures", pictures_part), ("goals", goals_part), ("misses", misses_part)):
        between = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        if not re.search(between, page, flags=re.DOTALL):
            raise SystemExit(f"The page has no place for {name}: <!-- {name} --> ... <!-- /{name} -->.")
        made = make(files)
        page = re.sub(between, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", page, flags=re.DOTALL)
    return page


# --- running --------------------------------------------------------------------------------------------------------


def run(name: str, quick: bool, folder: Path) -> tuple[int, Path | None]:
    """Exit code of a benchmark, and the file that it left (also where it failed later), named as the others are."""
    script, source = SCRIPTS[name], os.pathsep.join(filter(None, (str(HERE.parent / "src"), os.getenv("PYTHONPATH"))))
    folder.mkdir(parents=True, exist_ok=True)
    left = folder / f".gpu_{name}.json"  # gpu_model.py writes as it goes: what is killed with this process leaves that
    left.unlink(missing_ok=True)
    options = (*script.usual, *(script.quick if quick else ()))
    print(f"== gpu_{name}.py {' '.join(options)}", flush=True)
    call = [sys.executable, str(HERE / f"gpu_{name}.py"), *options, script.json, str(left.resolve())]
    code = subprocess.run(call, env=os.environ | {"PYTHONPATH": source}, check=False).returncode
    try:
        (file,) = read([left])
    except (OSError, json.JSONDecodeError) as error:
        print(f"gpu_{name}.py left no file: {error}", file=sys.stderr)
        return code or 1, None
    end = "-quick" if quick else ""
    return code, left.replace(folder / f"gpu_{name}-{slug(file.device)}-{datetime.date.today()}{end}.json")


def slug(device: str) -> str:
    """NVIDIA H200 as h200."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "")).strip("-")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="folder for the files")
    parser.add_argument("--only", nargs="+", choices=list(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases")
    parser.add_argument("--show", nargs="+", type=Path, metavar="PATH", help="the table of these files or folders")
    parser.add_argument("--markdown", nargs="?", const="", metavar="PAGE", help="with --show: print the goals in"
                        " Markdown, or fill that page with them")  # fmt: skip
    args = parser.parse_args(given)
    if args.markdown is not None and not args.show:
        parser.error("--markdown needs --show")
    return args


def main() -> int:
    args = arguments()
    if args.show:
        files = read(args.show)
        if args.markdown:
            page = Path(args.markdown)
            page.write_text(filled(page.read_text(encoding="utf-8"), files), encoding="utf-8")
        elif args.markdown == "":
            print(goals_part(files), misses_part(files), sep="\n\n")
        else:
            print(text(files))
        return 0
    done = {name: run(name, args.quick, args.results) for name in args.only}
    print(text(read([kept for _, kept in done.values() if kept])))
    failed = [f"gpu_{name}.py ended with {code}." for name, (code, _) in done.items() if code]
    print("\n".join(failed), file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
