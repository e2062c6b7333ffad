"""Time ops against the dense attention that they spare, length by length, in rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade import ops
from saccade.core.errors import BadOption, UnknownName
from saccade.measure import stats
from saccade.measure.score import clock
from saccade.measure.workloads import WORKLOADS, Shape, Work, Workload

LENGTHS = {"cpu": (1024, 2048, 4096, 8192), "cuda": (8192, 32768, 131072)}
HEADS = {"cpu": (9, 3, 64), "cuda": (32, 8, 128)}  # query heads, key/value heads, head size: of smollm2; of 8B Llamas
ROUNDS = 5
LEAST_SECONDS = 0.02  # of a measurement: a call that is shorter is repeated
MOST_CALLS = 500  # of a measurement
CHECKED_TOKENS = 1024  # the reference makes the whole map
Row = dict[str, Any]
Watch = Callable[[int, int, str], None]


def shapes(
    device: str,
    dtype: str,
    lengths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    density: float = 0.25,
    batch: int = 1,
) -> list[Shape]:
    """One per length; what is not said is usual on such a device. heads: query heads, key/value heads, head size.

    Raises:
        BadOption: no tokens, heads that do not divide, a density outside (0, 1].
    """
    kind = torch.device(device).type
    several, kv, size = heads or HEADS.get(kind, HEADS["cpu"])
    every = tuple(lengths) if lengths else LENGTHS.get(kind, LENGTHS["cpu"])
    if min((*every, several, kv, size, batch)) < 1 or several % kv:
        asked = f"lengths {list(every)}, heads {several} {kv} {size}, batch {batch}"
        raise BadOption(asked, "a zero, or query heads that are no multiple of the others", "Mend that.")
    if not 0 < density <= 1:
        raise BadOption(f"density {density:g}", "it lies outside (0, 1]", "Give the share of the pairs to compute.")
    sizes = {"batch": batch, "heads": several, "kv_heads": kv, "head_size": size, "density": density}
    place = {"dtype": getattr(torch, dtype), "device": torch.device(device)}
    return [Shape(tokens=n, **sizes, **place) for n in sorted(set(every))]


def find(name: str) -> Workload:
    """The workload of an op, by either spelling of its name.

    Raises:
        UnknownName: none of that name.
    """
    found = WORKLOADS.get(name.replace("_", "-"))
    if found is None:
        raise UnknownName("op with a workload", name, WORKLOADS, "See: saccade bench --dry-run")
    return found


def back_ends(name: str, shape: Shape) -> dict[str, list[str]]:
    """Of an op on this device: back end -> why it cannot run there ([] = it can). Nothing is computed."""
    return ops.explain(find(name).work(replace(shape, tokens=min(shape.tokens, CHECKED_TOKENS))).call)


@torch.no_grad()
def bench(names: Sequence[str], shapes: Sequence[Shape], rounds: int = ROUNDS, watch: Watch | None = None) -> list[Row]:
    """A row for each op, length and back end that can run (the reference, which is there to be read, apart)."""
    jobs = [(find(name), shape) for name in names for shape in shapes]
    rows = []
    for i, (load, shape) in enumerate(jobs):
        if watch is not None:
            watch(i, len(jobs), f"{load.op} at {shape.tokens:,} tokens")
        rows += _rows(load, shape, rounds)
    return rows


def _rows(load: Workload, shape: Shape, rounds: int) -> Iterator[Row]:
    work = load.work(shape)
    able = [name for name, why in ops.explain(work.call).items() if not why and name != "reference"]
    calls = {name: _bound(work, name) for name in able}
    firsts = {name: first_call(call, shape.device) for name, call in calls.items()}
    work.dense()
    turns = {name: how_often(call, shape.device) for name, call in (calls | {"": work.dense}).items()}
    times: list[dict[str, float]] = []
    for _ in range(rounds):
        times.append({n: timed(call, turns[n], shape.device) for n, call in (calls | {"": work.dense}).items()})
    for name in able:
        mine, dense = [t[name] for t in times], [t[""] for t in times]
        spread = stats.median_spread(mine)
        yield {
            "op": load.op,
            "stage": load.stage,
            "tokens": shape.tokens,
            "impl": name,
            **firsts[name],
            "seconds": spread["median"],
            "least": spread["low"],
            "largest": spread["high"],
            "dense_seconds": stats.median_spread(dense)["median"],
            "speedup": stats.median_spread([d / m for d, m in zip(dense, mine)])["median"],
            "bytes": work.bytes,
            "dense_bytes": work.dense_bytes,
            "difference": difference(load, shape, name),
        }


def _bound(work: Work, impl: str) -> Callable[[], Any]:
    return lambda: work.call(impl=impl)


def timed(call: Callable[[], Any], times: int, device: torch.device) -> float:
    """Of one of so many calls in a row."""
    start = clock(device)
    for _ in range(times):
        call()
    return (clock(device) - start) / times


def how_often(call: Callable[[], Any], device: torch.device) -> int:
    """So many that a measurement is long enough for the clock."""
    return max(1, min(MOST_CALLS, round(LEAST_SECONDS / max(timed(call, 1, device), 1e-9))))


def first_call(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Seconds of the call that loads and compiles what has to be, and what it needs at once beside its inputs (None
    where the device does not count)."""
    if device.type != "cuda":
        return {"first_seconds": timed(call, 1, device), "peak_bytes": None}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    seconds = timed(call, 1, device)
    return {"first_seconds": seconds, "peak_bytes": torch.cuda.max_memory_allocated(device) - before}


def difference(load: Workload, shape: Shape, impl: str) -> float | None:
    """Largest difference of a back end's first result from the reference in float64, on a text short enough for that.

    None where the op has no reference, or its result is a choice and no numbers.
    """
    short = replace(shape, tokens=min(shape.tokens, CHECKED_TOKENS))
    exact = load.work(short, exact=True)
    if "reference" not in ops.explain(exact.call):
        return None
    ours, truth = (_first(r) for r in (load.work(short).call(impl=impl), exact.call(impl="reference")))
    return float((ours.double() - truth).abs().max()) if ours is not None and truth is not None else None


def _first(result: Any) -> Tensor | None:
    first = result[0] if isinstance(result, tuple) else result
    return first if isinstance(first, Tensor) and first.is_floating_point() else None


def crossovers(rows: Sequence[Row]) -> list[Row]:
    """From which length on each op is faster than dense attention, by its best back end; None: not at these lengths."""
    found = []
    for op in dict.fromkeys(row["op"] for row in rows):
        best: dict[int, Row] = {}
        for row in (r for r in rows if r["op"] == op):
            if row["tokens"] not in best or row["seconds"] < best[row["tokens"]]["seconds"]:
                best[row["tokens"]] = row
        tokens = stats.crossover(list(best), [1 / row["speedup"] for row in best.values()])
        found.append({"op": op, "stage": next(iter(best.values()))["stage"], "tokens": tokens})
    return found
