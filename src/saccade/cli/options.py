"""Arguments that several verbs take, and what they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saccade import models
from saccade.cli.console import Bar, note
from saccade.core.errors import BadInput, BadOption

if TYPE_CHECKING:
    from saccade.core.budget import Budget
    from saccade.measure.runner import Engine

ENGINES = ("local", "ray")
METHOD = "NAME, NAME:OPTION=VALUE,OPTION=VALUE, or several that compose: A+B"
BUDGET = "what may be kept: a fraction (0.25, 25%%), tokens per head (4096tok) or bytes (2GiB)"


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --dtype, --device."""
    known = ", ".join(models.KNOWN)
    parser.add_argument(
        "--model", metavar="MODEL", help=f"{known}; a folder, a .gguf file or a name for transformers (smollm2)"
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 (the device's fastest)")
    parser.add_argument("--device", metavar="DEVICE", default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")


def add_budget(parser: argparse.ArgumentParser) -> None:
    """--budget, checked while it is read."""
    parser.add_argument("--budget", metavar="BUDGET", default="0.25", help=f"{BUDGET} (0.25)")


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="the same as JSON on stdout")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--engine, --address."""
    parser.add_argument("--engine", default="local", metavar="ENGINE", help="local, or ray: a cluster (local)")
    parser.add_argument("--address", metavar="ADDRESS", help="of a Ray cluster: auto, HOST:PORT (this machine alone)")


def engine(args: argparse.Namespace) -> Engine | None:
    """What --engine and --address say; None is this process.

    Raises:
        BadOption: there is no such engine, or it has no address.
        CannotRun: it is not installed.
    """
    if args.engine not in ENGINES:
        raise BadOption(f"--engine {args.engine}", "there is none of that name", f"Say {' or '.join(ENGINES)}.")
    if args.engine == "local":
        if args.address:
            raise BadOption(f"--address {args.address}", "the local engine has none", "Add --engine ray.")
        return None
    from saccade.engines.ray import Ray

    return Ray(args.address)


def budget(args: argparse.Namespace) -> Budget:
    """What --budget says.

    Raises:
        BadBudget: it is none.
    """
    from saccade.core.budget import Budget

    return Budget.of(args.budget)


def model_name(args: argparse.Namespace) -> str:
    """What --model says, or the default."""
    return args.model or "smollm2"


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and tokenizer; a download shows its size and terms first.

    Raises:
        BadOption: an unknown dtype, or a device that is not here.
        ModelUnavailable: it cannot be had.
    """
    from saccade.measure.environment import usual_dtype

    announce(model_name(args))
    with Bar(args.quiet) as bar:
        dtype = args.dtype or usual_dtype(args.device)
        return models.load(model_name(args), dtype=dtype, device=args.device, progress=bar)


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        BadInput: it cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        found = getattr(e, "strerror", None) or "it is no UTF-8 text"
        raise BadInput(f"read {file}", found, "Give a plain text file.") from e


def announce(name: str) -> bool:
    """Say what will be downloaded, and under which terms; False where nothing will be."""
    known = models.KNOWN.get(name)
    if known is None or models.is_cached(name):
        return False
    note(f"Fetching {known.title}: {known.download_bytes / 2**20:.0f} MiB, once. {known.licence}: {known.terms}")
    return True
