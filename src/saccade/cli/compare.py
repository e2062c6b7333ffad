"""many methods x budgets x tasks against full attention, in one report

Says what it will cost before it starts. Finished cells are on disk at once: the same command resumes.
`full`, `random` and `streaming` always take part, and `oracle-topk` up to 4096 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade import models
from saccade.cli.console import Bar, duration, note, say_json, say_table
from saccade.cli.options import BUDGET, METHOD, add_engine, add_json, add_model, announce, engine, model_name

if TYPE_CHECKING:
    from saccade.measure.planning import Plan

EXAMPLE = "saccade compare --methods snapkv minference+snapkv --budgets 0.5 0.25 --tasks passkey"
AFTER_INTERRUPT = "Finished cells are kept; the same command resumes."


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `compare` takes: all that `Config.command` writes, and where to."""
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help=f"each {METHOD} (some usual ones)")
    families = "all methods of these: sparse, cache, decode (or sparse,cache)"
    parser.add_argument("--family", nargs="+", metavar="FAMILY", help=families)
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="methods of these to leave out")
    parser.add_argument("--budgets", nargs="+", metavar="BUDGET", help=f"each {BUDGET} (0.5 0.25 0.1)")
    tasks = "see: saccade list; NAME=8: 8 samples of this one (continuation-loss passkey)"
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=tasks)
    parser.add_argument("--tokens", type=int, metavar="N", help="length of a sample")
    parser.add_argument("--count", type=int, metavar="N", help="samples of each task")
    parser.add_argument("--lengths", type=int, nargs="*", metavar="N", help="lengths to time, in tokens")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each length is timed")
    parser.add_argument("--quick", action="store_true", help="one budget, less of all: 90 s on 2 cores")
    parser.add_argument("--seed", type=int, default=0, help="root of all random streams (0)")
    add_model(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (saccade-runs/ and a name)")
    add_engine(parser)
    parser.add_argument("--plan", action="store_true", help="say what it will cost, and stop")
    add_json(parser)


def request(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `saccade.compare`, of `plan` and of `Config.of`."""
    names = ("budgets", "tasks", "tokens", "count", "lengths", "rounds", "quick", "seed", "without")
    families = [name for words in args.family or () for name in words.split(",") if name]
    families = families or args.family or []  # what names nothing is refused as a name
    given = {name: getattr(args, name) for name in (*names, "dtype", "device")}
    return {"model": model_name(args), "methods": args.methods, "families": families} | given


def run(args: argparse.Namespace) -> int:
    """1 where a cell failed."""
    import saccade
    from saccade.measure.compare import plan

    cost, place = plan(**request(args)), engine(args)
    if args.plan:
        _show_plan(cost, args.json)
        return 0
    note(_in_words(cost) if place is None else f"{_in_words(cost)} Of one worker as fast as this machine.")
    with Bar(args.quiet) as bar:
        if announce(model_name(args)):
            models.load(model_name(args), progress=bar)
        folder = saccade.compare(**request(args), out=args.out, progress=bar.event, engine=place)
    return _show(folder, args.json)


def _show(folder: Path, as_json: bool) -> int:
    import saccade

    page = saccade.report(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if as_json:
        say_json({"folder": str(folder), "report": str(page)} | summary)
    else:
        print(saccade.report(folder, format="terminal"))
        print(f"Report: {page}")
    note(f"Repeat: {shlex.join([*shlex.split(summary['repeat'][0]), '--out', str(folder)])}")
    if summary["failed"]:
        note(f"{len(summary['failed'])} cells failed; the same command tries them again.")
    return 1 if summary["failed"] else 0


def _show_plan(cost: Plan, as_json: bool) -> None:
    if as_json:
        say_json(dataclasses.asdict(cost))
        return
    heads = ("task", "cells", "samples", "tokens", "time")
    say_table(heads, [_plan_row(row) for row in cost.rows], right=heads[1:])
    print(f"\n{_in_words(cost)}")


def _plan_row(row: dict[str, Any]) -> list[str]:
    spent = "unknown" if row["seconds"] is None else duration(row["seconds"])
    counts = [str(row[name]) for name in ("cells", "samples")]
    return [row["task"], *counts, ", ".join(f"{n:,}" for n in row["tokens"]), spent]


def _in_words(cost: Plan) -> str:
    from saccade.report.words import say

    parts = [f"{cost.cells} cells", f"about {duration(60 * cost.minutes)}" if cost.minutes else cost.unknown]
    parts += [f"{say(cost.memory_bytes, 'bytes')} of memory"] if cost.memory_bytes else []
    fetched = f"{say(cost.download_bytes, 'bytes')} to fetch, {say(cost.disk_bytes, 'bytes')} of disk meanwhile"
    parts.append(fetched if cost.download_bytes else "nothing to fetch")
    return f"Will take: {', '.join(parts)}."
