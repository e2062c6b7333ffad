"""how many samples show an effect of a given size, or which effect so many samples can show

For paired differences: level 0.05 on both sides, power 0.8. A task's samples spread as they do for dense SmolLM2;
the spread of the difference between two methods follows from how alike they are on each sample.
"""

from __future__ import annotations

import argparse
from typing import Any

from saccade import tasks
from saccade.cli.console import note, say_json, say_table
from saccade.cli.options import add_json
from saccade.core.errors import BadOption

EXAMPLE = "saccade power --effect 0.05 --task passkey"
EFFECT = 0.05  # five points of a hit rate; five hundredths of a nat


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `power` takes."""
    parser.add_argument("--effect", type=float, help=f"a difference worth seeing, in the task's own unit ({EFFECT})")
    parser.add_argument("--count", type=int, help="samples that there are: which effect can they show?")
    parser.add_argument("--task", metavar="TASK", action="append", help="this task; may be said again (all)")
    parser.add_argument("--correlation", type=float, default=0.5, help="of two methods over the samples (0.5)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Always 0."""
    _check(args)
    effect = args.effect if args.effect or args.count else EFFECT
    rows = [_row(name, effect, args) for name in args.task or tasks.list_tasks()]
    if args.json:
        say_json(rows)
        return 0
    heads = {"task": "task", "metric": "metric", "spread": "spread"}
    heads |= {"samples": f"samples that show {effect:g}"} if effect else {}
    heads |= {"effect": f"effect that {args.count} samples show"} if args.count else {}
    say_table(list(heads.values()), [[str(row[h]) for h in heads] for row in rows], right=list(heads.values())[2:])
    note(f"Paired, level 0.05, power 0.8, correlation {args.correlation:g}. Hits are a rate, nll is in nats per token.")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.effect is not None and args.effect <= 0:
        raise BadOption(f"--effect {args.effect:g}", "it must be above zero", "Give the difference to be seen.")
    if args.count is not None and args.count < 2:
        raise BadOption(f"--count {args.count}", "one sample shows no spread", "Give 2 or more.")
    if not 0 <= args.correlation < 1:
        raise BadOption(f"--correlation {args.correlation:g}", "it lies outside [0, 1)", "Leave it away for 0.5.")


def _row(name: str, effect: float | None, args: argparse.Namespace) -> dict[str, Any]:
    from saccade.measure import stats

    said = tasks.describe(name)
    sd = stats.difference_sd(said["spread"], args.correlation)
    row = {"task": said["name"], "metric": said["metric"], "spread": said["spread"]}
    row |= {"samples": stats.samples_needed(effect, sd)} if effect else {}
    return row | ({"effect": round(stats.smallest_effect(args.count, sd), 4)} if args.count else {})
