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
from pathlib import Path
from typing import Any

import torch
from distilled import WITHOUT, distil, rows_between

from saccade import models
from saccade.claims.sea import measured_places
from saccade.methods.sparse.sea import Sea


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
    rows = rows_between(tokenizer, None, measured_places(tokenizer), tokens, tokens)
    return [rows[i * len(rows) // most] for i in range(most)] if len(rows) > most else rows


def main() -> None:
    given = arguments()
    model, tokenizer = models.load(given.model, dtype=given.dtype, device=given.device)
    method = Sea(pixels=given.pixels, train_steps=given.steps, train_texts=given.texts)
    distil(method, model, spared(tokenizer, given.tokens, given.rows), WITHOUT, given)


if __name__ == "__main__":
    main()
