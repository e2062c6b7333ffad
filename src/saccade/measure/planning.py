"""What a comparison will cost, before anything heavy begins: recorded costs, scaled by how fast this machine is now."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saccade import models
from saccade.measure.cells import Cell
from saccade.measure.config import Config
from saccade.measure.contestants import Contestant
from saccade.measure.program import Entry, everybody, timed
from saccade.measure.speed import STEPS, WARMUP_STEPS, WARMUP_TOKENS

# Recorded on two cores (AMD EPYC, AVX2) with smollm2 in float32, by the default comparison: time of a sample over that
# of `full`, by the part that a method takes over.
COSTS = {"evict": 1.0, "prefill": 1.35, "decode": 1.05}
ORACLE = 8.0  # the attention of what chooses by looking at everything
OVERHEAD = 1.85  # time of a forward over that of its matrix products alone, at a few hundred tokens on two threads
ATTENTION_TOKENS = 6000  # length at which full attention costs as much as all matrix products
CELL_TOKENS = 40  # the warm-up, once for all cells of a contestant, costs each as much as a forward over so many tokens
STEP_TOKENS = 36  # one decoding step costs as much as a forward over so many tokens: it reads all weights
LOADING_SECONDS = 6.0
LIBRARY_BYTES = 900 * 2**20  # torch and transformers themselves, and what a forward needs meanwhile
DOWNLOAD_BYTES_PER_SECOND = 5e6
CALIBRATION_SECONDS = 1.0
RECORDED = "cpu"  # the kind of device that all of these are about


@dataclass(frozen=True)
class Plan:
    """An estimate. None where the model's size is not known before it is loaded, or where no costs are recorded of such
    a device: `unknown` says which."""

    cells: int
    minutes: float | None
    memory_bytes: int | None
    download_bytes: int
    disk_bytes: int
    machine_flops: float | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    device: str = RECORDED
    unknown: str = ""


def estimate(config: Config, cells: Sequence[Cell]) -> Plan:
    """Of all cells, as if none were finished. Takes about a second, in which the machine is timed; of another device
    than a CPU no time is told, and nothing timed: a CPU's costs say nothing of it."""
    known, kind = models.KNOWN.get(config.model), config.device.partition(":")[0]
    speed = machine_flops(config.dtype) if known and kind == RECORDED else None
    load = known is not None and not models.is_cached(known.name)
    download = known.download_bytes if load and known else 0
    entries = everybody(config)
    per_token = OVERHEAD * 2 * known.parameters / speed if known and speed else None
    seconds = None if per_token is None else {c.key: per_token * weigh(config, entries, c) for c in cells}
    total = LOADING_SECONDS + download / DOWNLOAD_BYTES_PER_SECOND + sum(seconds.values()) if seconds else None
    return Plan(
        cells=len(cells),
        minutes=total and total / 60,
        memory_bytes=known and LIBRARY_BYTES + known.parameters * getattr(torch, config.dtype).itemsize,
        download_bytes=download,
        disk_bytes=known.needed_bytes if load and known else 0,
        machine_flops=speed,
        rows=_rows(cells, seconds, config),
        device=config.device,
        unknown=_unknown(config.device, kind, known is not None),
    )


def _unknown(device: str, kind: str, known: bool) -> str:
    """Why no time is told; nothing where one is."""
    if kind != RECORDED:
        return f"a time unknown on {device}: costs are recorded of CPUs only"
    return "" if known else "a time unknown before the model is loaded"


def _rows(cells: Sequence[Cell], seconds: Mapping[str, float] | None, config: Config) -> list[dict[str, Any]]:
    """One per task, and one for the timing."""
    rows = []
    for task in [*config.counts, "speed"]:
        mine = [c for c in cells if c.task == task]
        spent = None if seconds is None else sum(seconds[c.key] for c in mine)
        lengths = sorted({c.tokens for c in mine})
        row = {"task": task, "cells": len(mine), "samples": config.counts.get(task, 1), "tokens": lengths}
        rows.append(row | {"seconds": spent})
    return rows


def weigh(config: Config, entries: Sequence[Entry], cell: Cell) -> float:
    """How many tokens of a plain forward a cell is worth."""
    if cell.kind == "speed":
        rest = WARMUP_TOKENS + (STEPS + WARMUP_STEPS) * STEP_TOKENS
        return sum(CELL_TOKENS + _cost(who, cell.tokens) + rest for who, _ in timed(config, entries))
    who = next(e.who for e in entries if e.who.label == cell.label)
    return CELL_TOKENS + cell.count * _cost(who, cell.tokens)


def _cost(who: Contestant, tokens: int) -> float:
    """Of one sample."""
    attention = tokens / ATTENTION_TOKENS
    if not who.methods:
        return tokens * (1 + attention)
    part = max(COSTS.get(part, max(COSTS.values())) for part in who.parts)
    oracle = not who.timed and len(who.parts) > 1
    return tokens * part * (1 + attention * (ORACLE if oracle else 1.0))


def machine_flops(dtype: str) -> float:
    """Operations per second of a matrix product of a small model's shape, measured for a second."""
    a, b = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((512, 576), (576, 1536)))
    a @ b
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < CALIBRATION_SECONDS:
        a @ b
        done += 1
    return done * 2 * 512 * 576 * 1536 / (time.perf_counter() - start)
