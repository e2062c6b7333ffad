"""whether a method will work in a model, or every reason why not"""

from __future__ import annotations

import argparse

from saccade.cli.console import say_json
from saccade.cli.options import METHOD, add_budget, add_json, add_model, budget, load, model_name
from saccade.core.errors import BadOption

EXAMPLE = "saccade explain smollm2 minference --budget 0.25"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `explain` takes."""
    parser.add_argument("names", nargs="+", metavar="[MODEL] METHOD", help=METHOD)
    add_budget(parser)
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """1 where it will not work."""
    from saccade.measure.contestants import parse

    who, amount = parse(_method(args)), budget(args)
    model, _ = load(args)
    reasons = who.reasons(model, amount)
    if args.json:
        found = {"method": who.label, "model": model_name(args), "budget": str(amount)}
        say_json(found | {"runs": not reasons, "part": who.part, "reasons": reasons})
    elif reasons:
        listed = "".join(f"\n  - {reason}" for reason in reasons)
        print(f"{who.label} cannot run in {model_name(args)} at budget {amount}:{listed}")
    else:
        print(f"{who.label} runs in {model_name(args)} at budget {amount}; its part is {who.part or 'none'}.")
    return 1 if reasons else 0


def _method(args: argparse.Namespace) -> str:
    """The last name; one before it is the model, as in `saccade.explain(model, method)`."""
    *before, method = args.names
    if len(before) > 1 or (before and args.model):
        found = f"{len(before)} names before it, and --model {args.model}" if args.model else f"{len(before)} before it"
        raise BadOption(f"explain {method!r}", found, "Name one model and one method; what composes is written A+B.")
    args.model = before[0] if before else args.model
    return method
