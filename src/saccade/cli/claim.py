"""measure again what a paper says, and print the verdict with its intervals

Tiers: smoke (seconds; our machinery alone), cpu (minutes, a real model), gpu. Results are kept and shown by `list`.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from saccade.cli.console import Bar, note, say_json, say_table
from saccade.cli.options import add_engine, add_json, engine
from saccade.core import registry
from saccade.core.errors import BadOption, CannotRun

if TYPE_CHECKING:
    from saccade.measure.runner import Progress

EXAMPLE = "saccade claim snapkv minference --tier cpu"
AFTER_INTERRUPT = "Claims that were finished are kept; the same command goes on with the others."


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `claim` takes."""
    parser.add_argument("names", nargs="*", metavar="METHOD", help="whose claims")
    parser.add_argument("--all", action="store_true", help="those of all methods, baselines included")
    parser.add_argument("--tier", default="cpu", metavar="TIER", help="smoke, cpu or gpu (cpu)")
    add_engine(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """3 where any claim could not be measured, else 1 where any was not reproduced in full."""
    names = registry.list_methods() if args.all else args.names
    if not names or (args.all and args.names):
        found = "methods are named besides" if args.all else "no method is named"
        raise BadOption("claim --all" if args.all else "claim", found, "Give either names, or --all.")
    from saccade.claims._sweep import sweep

    names = [registry.card(name).name for name in names]  # a wrong one is said before minutes are spent on the others
    place, lines = engine(args), []
    with Bar(args.quiet) as bar:

        def found(line: dict[str, Any]) -> None:
            lines.append(line)
            with bar.aside():
                _tell(line, args.json)

        events, within = (_notes(args.quiet), bar) if place is None else (bar.event, None)
        sweep(names, args.tier, found, place, events, within)
    done = [line["found"] for line in lines if not line["error"]]
    if args.json:
        say_json(done)
    if len(done) < len(lines):
        return CannotRun.exit_code
    return 0 if all(result["verdict"] == "reproduced" for result in done) else 1


def _notes(quiet: bool) -> Progress:
    """Of a sweep in this process only what is no progress is told: its claims tell their own."""
    return lambda event: None if quiet or event.kind != "note" else note(event.text)


def _tell(line: dict[str, Any], as_json: bool) -> None:
    if line["error"]:
        note("{type}: {text}".format(**line["error"]))
    elif not as_json:
        _show(line["found"])


def _show(found: dict[str, Any]) -> None:
    print(f"{found['method']}: {found['says']}\n  {found['where']}; measured here: {found['setting']}")
    rows = [[c["name"], *map(_number, (c["value"], c["low"], c["high"], c["bar"])), _word(c)] for c in found["checks"]]
    heads = ("check", "value", "low", "high", "bar", "holds")
    say_table(heads, rows, right=heads[1:5])
    spent = f"tier {found['tier']}, {found['seconds']:.0f} s, {found['hardware']}"
    print(f"verdict: {found['verdict']} ({spent})" + (f"\n  {found['reason']}" if found["reason"] else "") + "\n")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _word(check: dict[str, Any]) -> str:
    return "yes" if check["holds"] else "unclear" if check.get("unclear") else "no"
