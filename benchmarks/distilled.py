"""What the scripts share that let a method learn from a model's own maps on the shipped text (train_*.py)."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from saccade.attach.calibration import Subject
from saccade.core.method import Method
from saccade.core.paths import cache_dir
from saccade.tasks import moby_dick

WITHOUT = "the shipped text, without the passages that the claim measures"


def rows_between(
    tokenizer: Any, text: str | None, taken: Sequence[tuple[int, int]], tokens: int, apart: int
) -> list[torch.Tensor]:
    """Rows of token ids of a text (the shipped one), `apart` from each other, none of which touches what is taken."""
    ids, taken = tokenizer(text or moby_dick(), add_special_tokens=False, verbose=False)["input_ids"], sorted(taken)
    parts = [ids[a:z] for a, z in zip([0, *(z for _, z in taken)], [*(a for a, _ in taken), len(ids)])]
    return [torch.tensor([p[i : i + tokens]]) for p in parts for i in range(0, len(p) - tokens + 1, apart)]


def distil(method: Method, model: Any, rows: Sequence[torch.Tensor], source: str, given: argparse.Namespace) -> None:
    """Calibrate, and save the artefact in `given.out`; says how far it is, and what came of it."""
    start = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        if done % 10 == 0 or done == total or done < len(rows):
            print(f"{done}/{total} {what}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    artefact = method.calibrate(Subject(model, cache_dir("drafts")), rows, progress)
    artefact = dataclasses.replace(artefact, data=f"{source}: {artefact.data}, {given.dtype}")
    path = artefact.save(given.out / artefact.model)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {dict(artefact.figures)}")
