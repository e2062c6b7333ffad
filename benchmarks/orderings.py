"""Each method that is trained, against the baselines that its paper has, by `saccade train`: does the ordering hold?

    PYTHONPATH=src python benchmarks/orderings.py --device cuda --jobs 12 --minutes 8 --json FILE.json
    PYTHONPATH=src python benchmarks/orderings.py --only halonet              # one of them, on the processor
    PYTHONPATH=src python benchmarks/orderings.py --steps 2 --seeds 2         # whether all of it runs
    PYTHONPATH=src python benchmarks/orderings.py --commands                  # the same, as one would type it

Every pair is what the command of its row does, and two pairs of one setting share `full`, `random` and what else they
have in common. --jobs processes take the trainings, first seed first; what is finished in --runs is not trained again,
also after a kill, and --minutes ends the taking of new ones: the same command then goes on. What is judged is what is
there, over the seeds from which all of a pair have been trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saccade.measure.environment import environment
from saccade.measure.store import write_json
from saccade.measure.training import loop, sharded
from saccade.measure.training.orderings import orderings
from saccade.measure.training.plan import NET, Plan, cell_folder, contestants
from saccade.measure.training.train import summarise
from saccade.measure.training.turns import Turns

SEEDS = 5
CHECKPOINT_STEPS = 200
FAILURES = 3  # one after the other, until a process gives up: a GPU that failed once fails always
SETTINGS: dict[str, dict[str, Any]] = {
    "pictures": {"task": "digits", "channels": 32, "rows": 128, "steps": 400, "budget": "16tok"},
    "recall": {"task": "needle", "rows": 64, "steps": 400, "budget": "16tok"},
    "far recall": {"task": "needle", "tokens": 128, "rows": 64, "steps": 600, "budget": "50tok"},
    "deep recall": {"task": "needle", "tokens": 128, "layers": 4, "rows": 64, "steps": 600, "budget": "0.5"},
    "prose": {"task": "mobydick", "tokens": 256, "rows": 32, "steps": 500, "budget": "0.25"},
}


@dataclass(frozen=True)
class Pair:
    """A method with its options, and what it is to be better than."""

    method: str
    setting: str
    mixer: str
    against: tuple[str, ...]
    what: str  # the baselines, in words

    @property
    def contestants(self) -> list[str]:
        """All that is trained for it."""
        return list(contestants([self.mixer], self.against))

    def command(self, steps: int | None = None) -> str:
        """As one would type it; steps: other than of the setting."""
        given = SETTINGS[self.setting] | ({} if steps is None else {"steps": steps})
        sizes = " ".join(f"--{name} {value}" for name, value in given.items())
        return f"saccade train {sizes} --mixer {self.mixer} --against {' '.join(self.against)}"


# NSA reads at most 3 blocks of 8 that are always chosen, 1 by content, 16 summaries and 8 near tokens, of 128
NSA = "native-sparse-attention:block_tokens=8,stride_tokens=8,select_tokens=8,select_blocks=4,window_tokens=8"
WINDOW = "streaming:sink_tokens=0"
ROUTING, LOCAL = "routing-transformer", "routing-transformer:local_heads=4"
BLOCKS, APART = "halonet:block=4,halo=0", "halonet:block=2,halo=0"
NEAR, TILED = "faster-neighborhood:kernel=3", "faster-neighborhood:kernel=3,stride=3"
BEHIND, CHUNKS = "faster-neighborhood:kernel=32", "faster-neighborhood:kernel=64,stride=64"  # as many pairs
AROUND = "faster-neighborhood:kernel=4"
SPARSE, FEATURES = "scatterbrain:exact_share=1", "scatterbrain:exact_share=0"
BESIDE, ALONE = "scatterbrain:support=window", "scatterbrain:support=window,exact_share=1"
PAIRS = (
    Pair("routing-transformer", "recall", ROUTING, (LOCAL,), "local heads alone"),
    Pair("landmark", "recall", "landmark:block_tokens=8,read_blocks=1", (WINDOW,), "a window of as many keys"),
    Pair("moba", "recall", "moba", ("moba:top_blocks=1",), "the own block alone"),
    Pair("s2-attention", "recall", "s2-attention", ("s2-attention:homo_head=true", WINDOW),
         "one stripe for all heads, a window of as many keys"),
    Pair("biformer", "recall", "biformer", (WINDOW,), "a window of twice as many keys"),
    Pair("sparsifiner", "recall", "sparsifiner", (WINDOW,), "a window of as many keys"),
    Pair("native-sparse-attention", "far recall", NSA, (WINDOW,), "a window of as many keys"),
    Pair("masformer", "deep recall", "masformer:full_layers=1", ("masformer:full_layers=0",), "local layers alone"),
    Pair("biformer", "pictures", "biformer", (BLOCKS, "random"), "windows that do not meet, random keys"),
    Pair("halonet", "pictures", "halonet:block=2,halo=1", (APART,), "blocks without a halo"),
    Pair("faster-neighborhood", "pictures", NEAR, (TILED,), "the same windows as blocks"),
    Pair("sparsifiner", "pictures", "sparsifiner", (AROUND, "random"), "keys around each cell, random keys"),
    Pair("pt-dit", "pictures", "pt-dit:window_side=2", (APART,), "windows alone"),
    Pair("combiner", "prose", "combiner:pattern=fixed,segment_tokens=16", ("random",), "random blocks, twice as dense"),
    Pair("faster-neighborhood", "prose", BEHIND, (CHUNKS,), "blocks of twice as many bytes, half of them seen"),
    Pair("scatterbrain", "prose", "scatterbrain", (SPARSE, FEATURES), "hashed keys alone, features alone"),
    Pair("scatterbrain", "prose", BESIDE, (ALONE,), "a window alone, twice as long"),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What all processes are told."""

    pairs: tuple[Pair, ...]
    seeds: int
    steps: int | None
    device: str
    runs: Path
    threads: int
    until: float

    def plan(self, setting: str) -> Plan:
        """Of all trainings of a setting."""
        given = SETTINGS[setting] | ({} if self.steps is None else {"steps": self.steps})
        sizes = {name: given.get(name) for name in NET}
        return Plan.of(given["task"], given["budget"], given.get("tokens"), "float32", **sizes)

    def cells(self) -> list[tuple[str, str, int]]:
        """Setting, mixer and seed of each training; the first seed of all comes first."""
        each = dict.fromkeys((pair.setting, label) for pair in self.pairs for label in pair.contestants)
        return [(*one, seed) for seed in range(self.seeds) for one in each]

    def work(self, setting: str, label: str, seed: int) -> loop.Work:
        """One training."""
        folder = cell_folder(self.runs / setting.replace(" ", "-"), label, seed)
        where = sharded.accelerator(self.device)
        return loop.Work(self.plan(setting), label, label, seed, folder, where, CHECKPOINT_STEPS, lambda *step: None)


def main() -> int:
    """0 if all that was asked for is there."""
    args = _arguments()
    pairs = tuple(pair for pair in PAIRS if not args.only or pair.method in args.only)
    if args.commands:
        print("\n".join(pair.command(args.steps) for pair in pairs))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("This was to run on a CUDA device, and there is none.", file=sys.stderr)
        return 3
    began, until = time.time(), time.time() + 60 * args.minutes if args.minutes else float("inf")
    threads = max(1, (os.cpu_count() or 1) // args.jobs) if args.device == "cpu" else 1
    run = Run(pairs, args.seeds, args.steps, args.device, args.runs, threads, until)
    children = [multiprocessing.get_context("spawn").Process(target=_take, args=(run,)) for _ in range(args.jobs)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    rows = [judged(run, pair) for pair in pairs]
    found = {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "seeds": run.seeds}
    found |= {"jobs": args.jobs, "seconds": time.time() - began, "environment": environment(args.device), "pairs": rows}
    print("\n".join(line for row in rows for line in told(row)))
    if args.json:
        write_json(args.json, found)
    return int(any(row["seeds"] < run.seeds for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[pair.method for pair in PAIRS], metavar="NAME", help="methods")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (cpu)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, all of them on one GPU (1)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"trainings of each mixer ({SEEDS})")
    parser.add_argument("--steps", type=int, metavar="N", help="batches (of each setting)")
    parser.add_argument("--minutes", type=float, metavar="X", help="begin no training after so many")
    parser.add_argument("--runs", type=Path, default=Path("saccade-runs/orderings"), metavar="DIR", help="trainings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers go")
    parser.add_argument("--commands", action="store_true", help="print what to type for each pair, and end")
    return parser.parse_args()


# --- train ----------------------------------------------------------------------------------------------------------


def _take(run: Run) -> None:
    """A process: cell after cell that no other one has, until none is left, time is up or who started it is gone."""
    torch.set_num_threads(run.threads)
    failed, parent = 0, multiprocessing.parent_process()
    with Turns() as turns:
        cells = run.cells()
        for i, cell in enumerate(cells):
            if time.time() > run.until or failed == FAILURES or not parent.is_alive():
                return
            work = run.work(*cell)
            if (work.folder / loop.RESULT).is_file():
                continue
            try:
                done = turns.take(work)
            except Exception:
                failed += 1
                print(f"{work.label}, seed {work.seed}: {traceback.format_exc(limit=-4)}", flush=True)
                continue
            if done:
                failed = 0
                said = f"{done['score']:.3f} in {done['seconds']:.0f} s"
                print(f"{i + 1}/{len(cells)} {cell[0]}: {work.label}, seed {work.seed}: {said}", flush=True)


# --- judge ----------------------------------------------------------------------------------------------------------


def judged(run: Run, pair: Pair) -> dict[str, Any]:
    """A row: the table of `saccade train`, and the orderings, of what has been trained."""
    plan, found = run.plan(pair.setting), []
    for seed in range(run.seeds):
        some = [loop.finished(run.work(pair.setting, label, seed)) for label in pair.contestants]
        if all(some):
            found += some
    row = {"method": pair.method, "setting": pair.setting, "what": pair.what, "command": pair.command(run.steps)}
    row |= {"plan": dataclasses.asdict(plan), "seeds": len(found) // len(pair.contestants)}
    if found:
        summary = summarise(plan, found)
        judge = orderings(summary["mixers"], [pair.mixer], pair.against, summary["higher_is_better"])
        row |= {name: summary[name] for name in ("metric", "higher_is_better", "mixers")} | {"orderings": list(judge)}
    return row


def told(row: Mapping[str, Any]) -> Sequence[str]:
    """For people."""
    if not row["seeds"]:
        return [f"{row['method']}: not trained yet"]
    lines = [f"{row['method']} ({row['setting']}, {row['seeds']} seeds, {row['metric']})"]
    lines += [f"  {x['mixer']:44} {x['score']['mean']:.4f}  {x['seconds']:.0f} s" for x in row["mixers"]]
    for one in row["orderings"]:
        better, low, high = (one["better_by"][name] for name in ("mean", "low", "high"))
        within = "" if low is None else f" [{low:+.4f}, {high:+.4f}]"
        lines.append(f"  better than {one['against']} by {better:+.4f}{within}: {one['verdict']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
