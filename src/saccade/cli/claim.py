"""measure again what a paper says, and print the verdict with its intervals

Tiers: smoke (seconds; our machinery alone), cpu (minutes, a real model), gpu. Results are kept and shown by `list`.
"""

from __future__ import annotations

import argparse
from typing import Any

from saccade.cli.console import Bar, note, say_json, say_table
from saccade.cli.options import add_json
from saccade.core import registry
from saccade.core.errors import BadOption, CannotRun

EXAMPLE = "saccade claim snapkv minference --tier cpu"
AFTER_INTERRUPT = "Claims that were finished are kept; the others start anew."


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `claim` takes."""
    parser.add_argument("names", nargs="*", metavar="METHOD", help="whose claims")
    parser.add_argument("--all", action="store_true", help="those of all methods, baselines included")
    parser.add_argument("--tier", default="cpu", metavar="TIER", help="smoke, cpu or gpu (cpu)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """3 where any claim could not be measured, else 1 where any was not reproduced in full."""
    names = registry.list_methods() if args.all else args.names
    if not names or (args.all and args.names):
        found = "methods are named besides" if args.all else "no method is named"
        raise BadOption("claim --all" if args.all else "claim", found, "Give either names, or --all.")
    for name in names:
        registry.card(name)  # a wrong name is said before minutes are spent on the right ones
    results = [_one(name, args) for name in names]
    done = [result for result in results if result]
    if args.json:
        say_json(done)
    if len(done) < len(results):
        return CannotRun.exit_code
    return 0 if all(result["verdict"] == "reproduced" for result in done) else 1


def _one(name: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Measured and shown; None where it cannot be, which stops no other."""
    from saccade.claims.run import claim

    try:
        with Bar(args.quiet) as bar:
            (found,) = claim([name], args.tier, bar)
    except CannotRun as e:
        note(f"CannotRun: {e}")
        return None
    if not args.json:
        _show(found)
    return found


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
