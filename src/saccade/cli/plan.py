"""what prefill, a step and the cache of a model cost on many GPUs, on paper: no GPU and no model is needed

From the stored times of one H200 and stated links; how, and what it leaves out: docs/explanation/scale.md.
A method pays where its phase is at least 1.1 times faster than dense on the same GPUs, or where it alone fits.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from saccade.cli.console import note, say_json, say_table
from saccade.cli.options import add_json
from saccade.core.errors import BadOption
from saccade.models.shapes import SHAPES, shape

if TYPE_CHECKING:
    from saccade.measure.scale import Cluster

EXAMPLE = "saccade plan --model llama-3-8b --context 1M --gpus 8"
UNITS = {"k": 2**10, "m": 2**20}
HEADS = ("method", "family", "phase", "time", "heads x tokens", "held by a GPU", "gain", "GPUs that hold it",
         "pays from tokens", "up to GPUs")  # fmt: skip
NOTHING = "–"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `plan` takes."""
    known = ", ".join(SHAPES)
    sizes = f"{known}, or a config.json (llama-3-8b)"
    parser.add_argument("--model", metavar="MODEL", default="llama-3-8b", help=sizes)
    parser.add_argument("--context", metavar="N", default="1M", help="tokens: 131072, 128k, 1M (1M, which is 2^20)")
    parser.add_argument("--gpus", type=int, metavar="G", default=8, help="1 to 1024 (8)")
    parser.add_argument("--link", type=float, metavar="GB/S", help="one way, between GPUs of a node (450)")
    parser.add_argument("--network", type=float, metavar="GB/S", help="one way, between nodes, of each GPU (50)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Always 0."""
    from saccade.measure import scale

    sizes, tokens, cluster = shape(args.model), context(args.context), _cluster(args)
    rows, work = list(scale.plan(sizes, tokens, cluster)), scale.dense_work(sizes, tokens)
    if args.json:
        links = {"link_bytes_per_second": cluster.link, "network_bytes_per_second": cluster.network}
        asked = {"model": sizes.name, "context": tokens, "gpus": cluster.gpus, **links}
        say_json(asked | {"parameters": sizes.parameters, "dense": work, "rows": rows})
        return 0
    say_table(HEADS, [_row(row) for row in rows], right=HEADS[3:])
    note(_in_words(sizes.name, tokens, work, scale.measured()["device"], cluster))
    return 0


def context(text: str) -> int:
    """Tokens, from a number with or without k or M.

    Raises:
        BadOption: it is none, or outside of what is reckoned.
    """
    from saccade.measure.scale import MOST_TOKENS

    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].lower() in UNITS else (text, "")
    try:
        tokens = int(float(digits) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise BadOption(f"--context {text}", "it is no number of tokens", "Say 131072, 128k or 1M.") from None
    if not 1 <= tokens <= MOST_TOKENS:
        do = f"Give 1 to {MOST_TOKENS:,}."
        raise BadOption(f"--context {text}", f"{tokens:,} tokens are not reckoned: measured points end at 512k", do)
    return tokens


def _cluster(args: argparse.Namespace) -> Cluster:
    from saccade.measure.scale import MOST_GPUS, Cluster

    if not 1 <= args.gpus <= MOST_GPUS:
        raise BadOption(f"--gpus {args.gpus}", "so many are not reckoned", f"Give 1 to {MOST_GPUS:,}.")
    speeds = {name: getattr(args, name) for name in ("link", "network") if getattr(args, name) is not None}
    slow = [f"--{name} {value:g}" for name, value in speeds.items() if not value > 0]
    if slow:
        raise BadOption(", ".join(slow), "nothing moves at that speed", "Give GB/s above zero.")
    return Cluster(args.gpus, **{name: value * 1e9 for name, value in speeds.items()})


def _row(row: dict[str, Any]) -> list[str]:
    gain = f"{row['gain']:.3g}" if row["gain"] else "only this fits" if row["only_this_fits"] else NOTHING
    pays = [NOTHING if not row["family"] else "never" if value is None else f"{value:,}"
            for value in (row["pays_from_tokens"], row["pays_to_gpus"])]  # fmt: skip
    split = f"{row['over_heads']} x {row['over_tokens']}" if row["fits"] else "does not fit"
    least = "over 1,024" if row["least_gpus"] is None else f"{row['least_gpus']:,}"
    time, held = _time(row["seconds"]), _room(row["held_bytes"])
    return [row["way"], row["family"] or NOTHING, row["phase"], time, split, held, gain, least, *pays]


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds / 60:,.0f} min"


def _room(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _in_words(name: str, tokens: int, work: dict[str, float], device: str, cluster: Cluster) -> str:
    dense = f"a prefill of {work['prefill_flops']:.2g} operations, a cache of {_room(work['cache_bytes'])}"
    links = f"{cluster.link / 1e9:g} GB/s within a node of {cluster.node_gpus}, {cluster.network / 1e9:g} between nodes"
    text = f"{name}, one text of {tokens:,} tokens: {dense}."
    return f"{text} {cluster.gpus} x {device}, {links}. Reckoned, not measured."
