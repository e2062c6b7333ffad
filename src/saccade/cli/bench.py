"""times and bytes against length, of any op or method on this machine; from which length on it pays

An op is timed on one layer's random tensors, against the dense attention that it spares; a method in the whole model,
side by side with full attention; a trainable layer, or with --layer a method's selection in one, by itself beside a
layer of full attention. The first call, which loads and compiles, is timed apart. From three lengths on it says with
which power of the length times grow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saccade.cli.console import Bar, note, say_json, say_table
from saccade.cli.options import METHOD, add_budget, add_json, add_model, announce, model_name
from saccade.core.errors import BadOption

EXAMPLE = "saccade bench attend decode --lengths 2048 8192"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `bench` takes."""
    parser.add_argument("names", nargs="*", metavar="OP|METHOD", help=f"an op, or a method: {METHOD} (all ops)")
    said = "methods as one layer, not in a model; sqrt as a value of their options is the root of the tokens"
    parser.add_argument("--layer", action="store_true", help=said)
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens (of ops: the device's usual ones)")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each is timed (5; methods 2)")
    parser.add_argument("--heads", type=int, nargs=3, metavar=("H", "G", "D"), help="of ops: query, key/value, size")
    size = {"nargs": 2, "default": (8, 64), "metavar": ("H", "D")}
    parser.add_argument("--layer-heads", type=int, help="of layers: heads and their size (8 64)", **size)
    parser.add_argument("--density", type=float, default=0.25, metavar="X", help="of ops: share of the pairs (0.25)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="of ops and layers: sequences (1)")
    add_budget(parser)
    add_model(parser)
    parser.add_argument("--dry-run", action="store_true", help="say which back ends can run here, why others cannot")
    parser.add_argument("--base", metavar="REV", help="in a checkout: against this commit, if the tests pass")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """1 where a timing failed, or with --base a test."""
    ops, layers, methods = _sorted(args)
    if args.dry_run:
        return _dry_run(args, ops)
    if args.base is not None:
        if layers:
            raise BadOption("bench --base", f"{', '.join(layers)}: layers are not compared", "Name ops and methods.")
        return _against(args, ops, methods)
    found = measured(args, ops, methods, layers)
    if args.json:
        say_json(found)
    else:
        _show(found, args)
    return 1 if found["failed"] else 0


def _sorted(args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Ops, layers and methods among the names; what is misspelt is said before anything is timed."""
    from saccade.core.method import compose
    from saccade.measure.contestants import parse
    from saccade.measure.layers import is_layer
    from saccade.measure.workloads import WORKLOADS

    names = args.names or list(WORKLOADS)
    ops = [name for name in names if name.replace("_", "-") in WORKLOADS]
    others = [name for name in names if name not in ops]
    layers = [name for name in others if args.layer or ("+" not in name and is_layer(name))]
    methods = [name for name in others if name not in layers]
    for name in methods:
        compose(parse(name).methods)
    for name in layers:
        _work(args).forward(name, 64)
    return ops, layers, methods


def _work(args: argparse.Namespace) -> Any:
    from saccade.core.budget import Budget
    from saccade.measure.environment import usual_dtype
    from saccade.measure.layers import Work

    dtype = args.dtype or usual_dtype(args.device)
    return Work(args.device, dtype, Budget.of(args.budget), args.lengths, *args.layer_heads, args.batch)


def measured(
    args: argparse.Namespace, ops: Sequence[str], methods: Sequence[str], layers: Sequence[str] = ()
) -> dict[str, Any]:
    """All that was timed, as `--json` prints it."""
    from saccade.measure.bench import ROUNDS, bench, crossovers
    from saccade.measure.environment import environment
    from saccade.measure.layers import bench_layers, slopes

    rounds = args.rounds or ROUNDS
    with Bar(args.quiet) as bar:
        rows = bench(ops, _shapes(args), rounds, bar) if ops else []
        alone, short = bench_layers(layers, _work(args), rounds, bar) if layers else ([], [])
        models = _models(args, methods, bar) if methods else {"speed": [], "crossover": [], "failed": []}
    speed = models["speed"]
    grown = [*slopes(rows, ("op", "impl")), *slopes(alone, ("layer",))]
    grown += slopes(speed, ("label", "budget"), ("prefill_seconds", "decode_seconds"))
    out = {"environment": environment(args.device), "ops": rows, "layers": alone, "methods": speed, "slopes": grown}
    return out | {"crossover": crossovers(rows) + models["crossover"], "failed": short + models["failed"]}


def _shapes(args: argparse.Namespace) -> list[Any]:
    from saccade.measure.bench import shapes
    from saccade.measure.environment import usual_dtype

    dtype = args.dtype or usual_dtype(args.device)
    return shapes(args.device, dtype, args.lengths, args.heads, args.density, args.batch)


def _models(args: argparse.Namespace, methods: Sequence[str], bar: Bar) -> dict[str, Any]:
    """Whole models: the timing of a comparison, and nothing else of it."""
    import json
    import tempfile

    import saccade
    from saccade import models

    if announce(model_name(args)):
        models.load(model_name(args), progress=bar)
    asked = {"budgets": [args.budget], "tasks": [], "lengths": args.lengths, "rounds": args.rounds}
    asked |= {"dtype": args.dtype, "device": args.device, "progress": bar.event}
    with tempfile.TemporaryDirectory() as folder:
        saccade.compare(model_name(args), list(methods), out=Path(folder) / "run", **asked)
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text(encoding="utf-8"))
    return {name: summary[name] for name in ("speed", "crossover", "failed")}


# --- in words ---------------------------------------------------------------------------------------------------------


def _show(found: dict[str, Any], args: argparse.Namespace) -> None:
    from saccade.measure.workloads import WORKLOADS

    if found["ops"]:
        times = ("first call", "median", "least - largest", "dense", "times as fast")
        numbers = ("tokens", *times, "MiB", "dense MiB", "difference")
        say_table(("op", "back end", *numbers), [_op_row(row) for row in found["ops"]], right=numbers)
        for op in dict.fromkeys(row["op"] for row in found["ops"]):
            note(f"{op}: {WORKLOADS[op].what}")
        note("Dense: PyTorch's attention of the same queries. MiB: what a call must read and write at least once.")
        note("Difference: the largest from the float64 reference, at 1,024 tokens or fewer.")
    if found["methods"]:
        heads = ("method", "budget", "tokens", "prefill", "times as fast", "a token", "times as fast ", "cache MiB")
        say_table(heads, [_method_row(row) for row in found["methods"]], right=heads[1:])
    if found["layers"]:
        times = ("first call", "median", "least - largest", "times as fast", "pairs")
        say_table(("layer", "tokens", *times), [_layer_row(row) for row in found["layers"]], right=("tokens", *times))
    for row in found["slopes"]:
        print(f"{row['who']}: {row['of'].replace('_', ' ')} grow as n^{row['power']:.2f} ({row['points']} lengths)")
    for row in found["crossover"]:
        say = "not faster than dense at these lengths" if row["tokens"] is None else f"from {row['tokens']:,.0f} tokens"
        print(f"{row.get('label') or row['op']}, {row['stage']}: {say}")
    for row in found["failed"]:
        note(f"{row['label']} at {row['tokens']:,} tokens: {row['text']}")


def _op_row(row: dict[str, Any]) -> list[str]:
    times = [_time(row["first_seconds"]), _time(row["seconds"]), f"{_time(row['least'])} - {_time(row['largest'])}"]
    sizes = [f"{row[name] / 2**20:,.2f}" for name in ("bytes", "dense_bytes")]
    apart = "-" if row["difference"] is None else f"{row['difference']:.1e}"
    head = [row["op"], row["impl"], f"{row['tokens']:,}"]
    return [*head, *times, _time(row["dense_seconds"]), f"{row['speedup']:.2f}", *sizes, apart]


def _layer_row(row: dict[str, Any]) -> list[str]:
    times = [_time(row["first_seconds"]), _time(row["seconds"]), f"{_time(row['least'])} - {_time(row['largest'])}"]
    gain = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
    pairs = "-" if row["density"] is None else f"{row['density']:.3f}"
    return [row["layer"], f"{row['tokens']:,}", *times, gain, pairs]


def _method_row(row: dict[str, Any]) -> list[str]:
    gains = [f"{row[f'{stage}_speedup']:.2f}" if row[f"{stage}_speedup"] else "-" for stage in ("prefill", "decode")]
    times = [_time(row["prefill_seconds"]), gains[0], _time(row["decode_seconds"]), gains[1]]
    return [row["label"], row["budget"], f"{row['tokens']:,}", *times, f"{row['bytes_held'] / 2**20:,.1f}"]


def _time(seconds: float) -> str:
    """In the unit that leaves three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def _dry_run(args: argparse.Namespace, ops: Sequence[str]) -> int:
    from saccade.measure.bench import back_ends
    from saccade.measure.workloads import WORKLOADS

    shape = _shapes(args)[0]
    rows = [
        {"op": op, "back_end": name, "runs": not why, "reasons": why}
        for op in ops or WORKLOADS
        for name, why in back_ends(op, shape).items()
    ]
    if args.json:
        say_json(rows)
        return 0
    shown = [[r["op"], r["back_end"], "no" if r["reasons"] else "ok", "; ".join(r["reasons"])] for r in rows]
    say_table(("op", "back end", "runs", "why not"), shown)
    note('"auto" takes the first that runs, but for flex and flash4, which have to be asked for.')
    return 0


# --- against a commit -------------------------------------------------------------------------------------------------


def _against(args: argparse.Namespace, ops: Sequence[str], methods: Sequence[str]) -> int:
    from saccade.cli import revision

    words = [*ops, *methods, "--density", str(args.density), "--batch", str(args.batch), "--budget", args.budget]
    words += ["--model", model_name(args), "--device", args.device]
    for name in ("lengths", "heads", "rounds", "dtype"):
        given = getattr(args, name)
        words += [] if given is None else [f"--{name}", *map(str, given if isinstance(given, list) else [given])]
    with Bar(args.quiet) as bar:
        red = revision.red_tests(ops, methods, args.device, bar)
        rows = [] if red else revision.side_by_side(args.base, words, bar)
    if args.json:
        say_json({"base": args.base, "red_tests": red, "rows": rows})
    elif red:
        note(f"No gain is shown: these tests fail here: {', '.join(red)}")
    else:
        heads = ("name", "tokens", "what", args.base, "here", "times as fast", "least - largest")
        say_table(heads, [_base_row(row) for row in rows], right=[h for h in heads if h not in ("name", "what")])
    return 1 if red else 0


def _base_row(row: dict[str, Any]) -> list[str]:
    spread = f"{row['least']:.2f} - {row['largest']:.2f}"
    times = [_time(row["base_seconds"]), _time(row["seconds"]), f"{row['ratio']:.2f}"]
    return [row["name"], f"{row['tokens']:,}", row["what"], *times, spread]
