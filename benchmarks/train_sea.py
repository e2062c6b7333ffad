"""Train SEA's estimators for a model and write the artefact.

    PYTHONPATH=src python benchmarks/train_sea.py --tokens 512 --rows 110 --texts 4 --steps 500 \
        --device cuda --dtype bfloat16 --out OUT

The rows are those of the shipped text that `saccade claim sea` does not measure, from all over it. Each is read once by
the model; a step then is some rows in every layer. Interrupted, the same command goes on from the last 50 steps.
`--model` is a known name, a folder or a .gguf file. Progress goes to stderr, one line at the end to stdout. OUT then
holds NAME.safetensors and NAME.json, NAME being the model's.
On two threads of a CPU `--tokens 64 --rows 4 --steps 3` shows in half a minute that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch

from saccade import models
from saccade.attach.calibration import Subject
from saccade.claims.sea import measured_places
from saccade.core.paths import cache_dir
from saccade.methods.sparse.sea import Sea
from saccade.tasks import moby_dick


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model; estimators are trained in float32")
    parser.add_argument("--rows", type=int, default=24, help="of text, at most")
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--pixels", type=int, default=64, help="of a row of the estimated map")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--texts", type=int, default=1, help="rows of a step")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefact")
    return parser.parse_args()


def spared(tokenizer: Any, tokens: int, most: int) -> list[torch.Tensor]:
    """Rows of token ids of the shipped text, evenly over it, but for what the claim measures."""
    ids = tokenizer(moby_dick(), add_special_tokens=False, verbose=False)["input_ids"]
    taken = sorted(measured_places(tokenizer))
    parts = [ids[a:z] for a, z in zip([0, *(z for _, z in taken)], [*(a for a, _ in taken), len(ids)])]
    rows = [torch.tensor([p[i : i + tokens]]) for p in parts for i in range(0, len(p) - tokens + 1, tokens)]
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows


def main() -> None:
    given, start = arguments(), time.perf_counter()
    model, tokenizer = models.load(given.model, dtype=given.dtype, device=given.device)
    rows = spared(tokenizer, given.tokens, given.rows)

    def progress(done: int, total: int, what: str) -> None:
        if done % 10 == 0 or done == total or done < len(rows):
            print(f"{done}/{total} {what}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    method = Sea(pixels=given.pixels, train_steps=given.steps, train_texts=given.texts)
    artefact = method.calibrate(Subject(model, cache_dir("drafts")), rows, progress)
    source = "the shipped text, without the passages that the claim measures"
    artefact = dataclasses.replace(artefact, data=f"{source}: {artefact.data}, {given.dtype}")
    path = artefact.save(given.out / artefact.model)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {dict(artefact.figures)}")


if __name__ == "__main__":
    main()
