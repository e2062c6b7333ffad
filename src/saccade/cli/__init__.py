"""The command line: one file per verb, each with EXAMPLE, `arguments(parser)` and `run(args) -> exit code`.

Data goes to stdout, all else to stderr. Starting imports no torch: verbs import what is heavy when they run.
Exit codes: 0 done; 1 it ran, and the answer is no; 2 wrong usage; 3 cannot run here; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from saccade import __version__
from saccade.core.errors import SaccadeError, UnknownName

VERBS = {
    "look": ("list", "show", "explain"),
    "use": ("run", "serve", "export", "calibrate"),
    "measure": ("compare", "report", "claim", "power", "bench", "plan"),
    "build": ("train", "new", "check", "doctor"),
}
INTERRUPTED, PIPE_CLOSED = 130, 141  # as shells report SIGINT and SIGPIPE


class WrongUsage(SaccadeError):
    """Arguments that the verb does not take."""

    exit_code = 2


class Parser(argparse.ArgumentParser):
    """Argparse whose errors are ours, so that all errors look the same."""

    def error(self, message: str) -> NoReturn:
        raise WrongUsage(self.prog, message, f"{self.format_usage().strip()}\nSee: {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    given = [*(sys.argv[1:] if argv is None else argv)]  # `list` is a verb in here
    try:
        code = _dispatch(given)
        sys.stdout.flush()
        return code
    except SaccadeError as e:
        if "--debug" in given:
            traceback.print_exc()
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print(f"\nInterrupted. {_after_interrupt(given)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has seen enough; without this python complains once more when it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _dispatch(given: list[str]) -> int:
    if not given:
        print(overview(), file=sys.stderr)
        return WrongUsage.exit_code
    if given[0] in ("-h", "--help", "--version"):
        print(__version__ if given[0] == "--version" else overview())
        return 0
    module = _module(given[0])
    try:
        args = parser(given[0]).parse_args(given[1:])
    except SystemExit as e:  # argparse has printed the help
        return int(e.code or 0)
    _log(args)
    return module.run(args)


def _module(verb: str) -> ModuleType:
    known = [v for verbs in VERBS.values() for v in verbs]
    if verb not in known:
        raise UnknownName("verb", verb, known, "See: saccade --help")
    return importlib.import_module(f"saccade.cli.{verb}")


def parser(verb: str) -> Parser:
    """The arguments of a verb, with those that all share."""
    module = _module(verb)
    made = Parser(
        prog=f"saccade {verb}",
        description=module.__doc__,
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.arguments(made)
    made.add_argument("-q", "--quiet", action="store_true", help="show no progress")
    made.add_argument("-v", "--verbose", action="store_true", help="say more about what is being done")
    made.add_argument("--debug", action="store_true", help="show where an error comes from")
    return made


def overview() -> str:
    """What `saccade --help` says."""
    lines = ["usage: saccade VERB ...", ""]
    lines += ["Sparse, cheap and legible attention, with a checked claim for every method."]
    for group, verbs in VERBS.items():
        lines += ["", group, *(f"  {v:<10} {str(_module(v).__doc__).splitlines()[0]}" for v in verbs)]
    return "\n".join([*lines, "", "saccade VERB --help says more, with an example."])


def _after_interrupt(given: list[str]) -> str:
    return getattr(_module(given[0]), "AFTER_INTERRUPT", "The same command starts anew.")


def _log(args: argparse.Namespace) -> None:
    """Log records as bare lines on stderr; where they come from is for --debug."""
    logging.basicConfig(format="%(message)s")
    level = logging.DEBUG if args.debug else logging.INFO if args.verbose else logging.ERROR
    logging.getLogger("saccade").setLevel(level)
