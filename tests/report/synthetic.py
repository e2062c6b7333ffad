"""A run directory made up from a seed: cells as saccade.measure writes them, and the summary it makes of them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from random import Random

from saccade.core import rng
from saccade.measure.summary import summarise

PARTS = {
    "full": None,
    "streaming": "prefill+cache",
    "snapkv": "cache",
    "knorm": "cache",
    "duo-attention": "cache",
    "minference": "prefill",
    "hip": "prefill",
    "double-sparsity": "decode",
    "kivi": "packing",
    "random:part=prefill": "prefill",
    "random:part=evict": "cache",
    "random:part=decode": "decode",
}
BUDGETS = ("0.5", "0.25", "0.1")
LENGTHS = (512, 1024, 2048, 4096, 8192)
TASKS = {
    "loss": {"title": "Loss on the last 512 tokens", "metric": "nll", "query_aware": None, "one_pass": True},
    "passkey": {"title": "Passkey", "metric": "hit", "query_aware": True, "one_pass": False},
    "passkey-agnostic": {"title": "Passkey, question later", "metric": "hit", "query_aware": False, "one_pass": False},
}
TOKEN_BYTES, TOKENS, SAMPLES = 46080, 2048, 12
FIELD = [(label, b) for label in PARTS for b in (BUDGETS if label not in ("full", "kivi") else ("1",))]


def make(
    folder: Path, seed: int = 0, speed: bool = True, breaks: bool = True, kept: bool = True, text: str = ""
) -> Path:
    """Write the files of a run; `text` is added wherever a stranger's words can come in."""
    draw = rng.python("test", seed)
    cells = [_quality(draw, label, b, task, breaks, kept, text) for label, b in FIELD for task in _tasks_of(label)]
    cells += [_again(cell) for cell in cells if cell["label"] == "full"]
    cells += [_speed(draw, n, i, text) for n in LENGTHS for i in range(3)] if speed else []
    lines = {cell["key"]: cell for cell in cells}
    run = {"schema": 1, "model": "smollm2" + text, "command": "saccade compare" + text, "seed": seed, "tasks": TASKS}
    run |= {"cells": list(lines), "not_exercised": [], "left_out": []}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "env.json").write_text(
        json.dumps({"torch": "2.13.0", "device": "cpu" + text, "threads": 2, "cuda": None})
    )
    (folder / "cells").mkdir(exist_ok=True)
    for key, line in lines.items():
        (folder / "cells" / f"{key}.json").write_text(json.dumps(line))
    (folder / "summary.json").write_text(json.dumps(summarise(run, lines)))
    return folder


def add_maps(folder: Path, seed: int = 0, text: str = "") -> dict:
    """Maps as `saccade.measure.pictures` leaves them, of some of the methods; what they say."""
    some = {"snapkv": ["decode"], "hip": ["prefill"], "streaming": ["prefill", "decode"]}
    draw = rng.python("test", seed)
    pictures = [{"label": label + text, "budget": "0.25", "stretches": [_stretch(draw, s) for s in stages]}
                for label, stages in {"full": ["prefill"], **some}.items()]  # fmt: skip
    said = {"schema": 1, "text": "Moby-Dick", "tokens": 256, "layer": 3, "head": 5, "rule": "the one that looks afar"}
    said |= {"pictures": pictures, "without": [{"label": "kivi" + text, "budget": "1", "why": "it cannot" + text}]}
    (folder / "maps.json").write_text(json.dumps(said))
    return said


def _stretch(draw: Random, stage: str) -> dict:
    high, wide = (48, 48) if stage == "prefill" else (12, 48)
    there = [[j <= i + wide - high for j in range(wide)] for i in range(high)]
    codes = {name: bytes(draw.randrange(most) if ok else 255 for row in there for ok in row)
             for name, most in (("chosen", 101), ("mass", 251))}  # fmt: skip
    shares = {f"{name}{here}": draw.random() for name in ("density", "covered") for here in ("", "_here")}
    places = {"stage": stage, "first": 0, "queries": 200, "shape": [high, wide]}
    return places | shares | {name: base64.b64encode(code).decode() for name, code in codes.items()}


def _again(cell: dict) -> dict:
    samples = [s | {"score": s["score"] + i / 5000} for i, s in enumerate(cell["samples"])]
    return cell | {"key": cell["key"] + "-again", "repeat": 1, "samples": samples}


def _tasks_of(label: str) -> list[str]:
    return [task for task, facts in TASKS.items() if not facts["one_pass"] or "prefill" in (PARTS[label] or "prefill")]


def _share(label: str, budget: str, part: str) -> float:
    return float(budget) if part in (PARTS[label] or "") else 1.0


def _worded(label: str, text: str) -> str:
    return label if label == "full" or not text else f"{label}:pooling={text}"


def _quality(draw, label: str, budget: str, task: str, breaks: bool, kept: bool, text: str) -> dict:
    samples = [_sample(draw, i, label, budget, task, breaks, text) for i in range(SAMPLES)]
    names = ("kept_fraction", "prefill_density", "decode_density", "bytes_held", "bytes_full")
    return {
        "kind": "quality",
        "key": f"{label} {budget} {task}",
        "method": label.partition(":")[0],
        "label": _worded(label, text),
        "part": PARTS[label],
        "baseline": label.startswith(("full", "random", "streaming")),
        "budget": budget,
        "task": task,
        "tokens": TOKENS,
        "repeat": 0,
        "samples": samples,
        "achieved": {name: samples[0].get(name) for name in names},
        "seconds_warmup": 0.03,
        "back_ends": ["attend:torch"],
        "kept": _picture(draw, float(budget), PARTS[label]) if kept and PARTS[label] not in (None, "prefill") else None,
        "error": None,
    }


def _sample(draw, i: int, label: str, budget: str, task: str, breaks: bool, text: str) -> dict:
    hurt = (1 - float(budget)) ** 2 * (2 if label.startswith("random") else 1) * draw.uniform(0.2, 0.4)
    out = {"id": f"{task}-{i}{text}", "facts": {"depth": i / SAMPLES, "words" + text: text}}
    out |= {
        "prefill_density": _share(label, budget, "prefill"),
        "seconds_prefill": 0.5 * float(budget) + draw.random() / 9,
    }
    out |= {"seconds_decode": 0.02}
    if TASKS[task]["metric"] == "nll":
        return out | {"score": 2.3 + i / 50 + hurt * draw.uniform(0, 1)}
    held = _share(label, budget, "cache")
    out |= {"decode_density": _share(label, budget, "decode"), "kept_fraction": held}
    out |= {"bytes_held": int(TOKENS * TOKEN_BYTES * held), "bytes_full": TOKENS * TOKEN_BYTES}
    out |= {"asked": "What is the pass key?" + text, "expected": "48213" + text, "said": "71112" + text}
    return out | {"score": float(not breaks or draw.random() > hurt)}


def _picture(draw, budget: float, part: str) -> dict:
    shares = [[[round(min(1, budget * 2 * draw.random()), 1) for _ in range(64)] for _ in range(3)] for _ in range(30)]
    what = {"decode": "read", "packing": "bits"}.get(part, "kept")
    return {"what": what, "seen": TOKENS, "bits": 32 if what == "bits" else None, "share": shares}


def _speed(draw, tokens: int, number: int, text: str) -> dict:
    measures = [_measure(draw, label, b, tokens, text) for label, b in FIELD]
    head = {"kind": "speed", "key": f"speed {tokens} {number}", "label": "", "budget": "", "task": "speed"}
    return head | {"tokens": tokens, "repeat": number, "error": None, "measures": measures}


def _measure(draw, label: str, budget: str, n: int, text: str) -> dict:
    prefill = 2e-5 * n + _share(label, budget, "prefill") * 3e-8 * n * n + (label != "full") * draw.uniform(0.1, 0.2)
    least = min(_share(label, budget, "cache"), _share(label, budget, "decode"))
    row = {"method": label.partition(":")[0], "label": _worded(label, text), "part": PARTS[label], "budget": budget}
    row |= {"bytes_held": int(n * TOKEN_BYTES * _share(label, budget, "cache")), "warmup_seconds": 0.3, "error": None}
    return row | {"prefill_seconds": prefill, "decode_seconds": 0.02 + least * 4e-6 * n * draw.uniform(0.8, 1.2)}
