"""methods, tasks, those to train on, and models, with what was found of each claim"""

from __future__ import annotations

import argparse
import fnmatch
from typing import Any

from saccade import models, tasks
from saccade.claims._found import latest
from saccade.cli.console import note, say_json, say_table
from saccade.cli.options import add_json
from saccade.core import registry
from saccade.core.card import FAMILIES
from saccade.tasks import training

EXAMPLE = "saccade list '*kv*' --family cache"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `list` takes."""
    parser.add_argument("pattern", nargs="?", default="*", help="names that match this shell pattern (all)")
    parser.add_argument("--family", choices=FAMILIES, help="methods of this family alone")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """1 where nothing matches."""
    found = {"methods": [_method(n) for n in registry.list_methods(args.pattern, args.family)]}
    if args.family is None:
        found["tasks"] = [_task(n) for n in _matching(tasks.list_tasks(), args.pattern)]
        names = _matching(training.list_training_tasks(), args.pattern)
        found["training"] = [{"to train on": n, **_about(training.describe(n))} for n in names]
        found["models"] = [_model(n) for n in _matching(list(models.KNOWN), args.pattern)]
    if args.json:
        say_json(found)
    else:
        _tables({kind: rows for kind, rows in found.items() if rows})
    if not any(found.values()):
        note(f"nothing matches {args.pattern!r}" + (f" in family {args.family!r}" if args.family else ""))
    return 0 if any(found.values()) else 1


def _matching(names: list[str], pattern: str) -> list[str]:
    return [n for n in names if fnmatch.fnmatch(n, pattern)]


def _method(name: str) -> dict[str, Any]:
    card, found = registry.card(name), latest(name)
    real = found and found["tier"] != "smoke"  # the smoke tier tests our machinery, not the paper
    claim = found["verdict"] if found and real else "baseline" if card.baseline else "not attempted"
    row = {"method": name, "family": card.family, "year": str(card.year) if card.paper else "", "claim": claim}
    return row | {"about": card.summary}


def _task(name: str) -> dict[str, Any]:
    return {"task": name, **_about(tasks.describe(name))}


def _about(said: dict[str, Any]) -> dict[str, Any]:
    return {"metric": said["metric"], "about": said["title"]}


def _model(name: str) -> dict[str, Any]:
    known = models.KNOWN[name]
    here = "here" if models.is_cached(name) else f"{known.download_bytes / 2**20:.0f} MiB to fetch"
    row = {"model": name, "state": here, "licence": known.licence, "context": f"{known.context_tokens:,} tokens"}
    return row | {"about": known.title}


def _tables(found: dict[str, list[dict[str, Any]]]) -> None:
    for number, rows in enumerate(found.values()):
        if number:
            print()
        say_table(list(rows[0]), [list(row.values()) for row in rows])
