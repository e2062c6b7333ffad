"""train mixers and selections from scratch in one small net, against full and random

A mixer is a registered layer, or a method whose selection an attention layer then uses. With --against, each is held
against its baselines: held, unclear or not held, by the interval over the seeds. What is finished in --out is not
trained again, and what was broken off goes on from its checkpoint. The same command in several shells shares the
trainings; accelerate launch --num_processes 2 -m saccade train ... shares each of them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from saccade.cli.console import Bar, note, say_json, say_table
from saccade.cli.options import METHOD, add_budget, add_json
from saccade.tasks import training

EXAMPLE = "saccade train --task digits --mixer halonet:block=2,halo=1 --against halonet:block=2,halo=0 --seeds 2"
AFTER_INTERRUPT = "Checkpoints and finished trainings are kept; the same command resumes."
HEADS = ("mixer", "score", "low", "high", "minus full", "low", "high", "pairs", "seconds", "against full")
ORDER_HEADS = ("mixer", "against", "better by", "low", "high", "ordering")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `train` takes."""
    tasks = ", ".join(training.list_training_tasks())
    parser.add_argument("--task", required=True, metavar="TASK", help=tasks)
    form = METHOD.split(", or")[0]
    parser.add_argument("--mixer", nargs="*", default=[], metavar="MIXER", help=f"each {form}, beside full and random")
    said = "baselines, trained too: is each --mixer better than each of these?"
    parser.add_argument("--against", nargs="*", default=[], metavar="MIXER", help=said)
    add_budget(parser)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="trainings of each mixer (5)")
    own = "of the task's own"
    parser.add_argument("--steps", type=int, metavar="N", help=f"batches ({own})")
    parser.add_argument("--rows", type=int, metavar="N", help=f"rows of a batch, over all processes ({own})")
    parser.add_argument("--tokens", type=int, metavar="N", help=f"tokens of a row ({own})")
    parser.add_argument("--channels", type=int, metavar="N", help=f"width of the net ({own})")
    parser.add_argument("--layers", type=int, metavar="N", help=f"blocks of the net ({own})")
    parser.add_argument("--heads", type=int, metavar="N", help=f"heads of a layer ({own})")
    parser.add_argument("--learning-rate", type=float, metavar="X", help=f"the highest ({own})")
    parser.add_argument("--dtype", default="float32", metavar="DTYPE", help="float32 or float64 (float32)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, or cuda: what accelerate finds (cpu)")
    parser.add_argument("--checkpoint", type=int, default=100, metavar="N", help="steps from one to the next (100)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (saccade-runs/train-TASK)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Always 0: what cannot be trained is an error."""
    from saccade.measure.training import train

    first = os.environ.get("RANK", "0") == "0"  # the others of `accelerate launch` say nothing
    out = args.out or Path("saccade-runs") / f"train-{args.task}"
    names = ("against", "budget", "seeds", "steps", "rows", "tokens", "channels", "layers", "heads", "learning_rate")
    given = {name: getattr(args, name) for name in (*names, "dtype", "device")}
    if first:
        _announce(args.task)
    with Bar(args.quiet or not first) as bar:
        found = train(args.task, args.mixer, out, checkpoint_steps=args.checkpoint, progress=bar, **given)
    if first:
        _show(found, out, args.json)
    return 0


def _announce(task: str) -> None:
    data = training.get(task).missing()
    if data:
        note(f"Fetching {data.title}: {data.download_bytes / 2**20:.0f} MiB, once. {data.licence}: {data.terms}")


def _show(found: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        say_json(found)
        return
    plan = found["plan"]
    seeds, unit = found["mixers"][0]["seeds"], "bits per token" if found["metric"] == "bits" else found["metric"]
    better = "higher" if found["higher_is_better"] else "lower"
    print(f"{plan['task']}, {plan['steps']} steps of {plan['rows']} rows, {seeds} seeds; {unit}, {better} is better")
    say_table(HEADS, [_row(line, found["higher_is_better"]) for line in found["mixers"]], right=HEADS[1:-1])
    if found["orderings"]:
        print()
        say_table(ORDER_HEADS, [_ordering(line) for line in found["orderings"]], right=ORDER_HEADS[2:-1])
    note(f"All numbers: {out / 'summary.json'}")


def _row(line: dict[str, Any], higher: bool) -> list[str]:
    less = line["minus_full"] or {"mean": None, "low": None, "high": None}
    figures = [found[name] for found in (line["score"], less) for name in ("mean", "low", "high")]
    return [
        line["mixer"],
        *map(_short, figures),
        "–" if line["density"] is None else f"{line['density']:.2f}",
        f"{line['seconds']:.0f}",
        "" if line["minus_full"] is None else _against(less["low"], less["high"], higher),
    ]


def _ordering(line: dict[str, Any]) -> list[str]:
    figures = [line["better_by"][name] for name in ("mean", "low", "high")]
    return [line["mixer"], line["against"], *map(_short, figures), line["verdict"]]


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _against(low: float | None, high: float | None, higher: bool) -> str:
    if low is None or high is None or low <= 0 <= high:
        return "not to be told apart"
    return "better" if (low > 0) == higher else "worse"
