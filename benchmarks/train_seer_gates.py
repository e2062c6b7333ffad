"""Train SeerAttention's gates for a model and write the artefact.

    PYTHONPATH=src python benchmarks/train_seer_gates.py --model PATH/smollm2 --device cuda --dtype bfloat16 \
        --tokens 2048 --apart 500 --block 16 --parts 1 --steps 300 --out OUT

Without `--text` the rows are those of the shipped text that `saccade claim seer-attention` does not measure. Each row
is read once, which takes a dense forward; the steps then read a few megabytes a row, which are held in memory.
Interrupted, the same command goes on where it was.

`--model` is a known name, a folder or a .gguf file (which needs the package gguf). Progress goes to stderr, one line at
the end to stdout. OUT then holds NAME.safetensors and NAME.json, NAME being the model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from distilled import WITHOUT, distil, rows_between

from saccade import models
from saccade.claims.seer_attention import measured_places
from saccade.methods.sparse.seer_attention import SeerAttention

STRIDE = 7  # rows are taken so many apart, then those between, so that a few come from all over the text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model; gates are trained in float32")
    parser.add_argument("--text", type=Path, help="a long plain text")
    parser.add_argument("--rows", type=int, default=300, help="of text, at most")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--apart", type=int, help="from one row to the next (a row; less gives rows that overlap)")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block")
    parser.add_argument("--parts", type=int, default=0, help="0: gates on keys alone; else on queries too, so wide")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--texts", type=int, default=8, help="rows of a step")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefact")
    return parser.parse_args()


def spared(tokenizer: Any, text: str | None, tokens: int, apart: int) -> list[torch.Tensor]:
    """Rows of token ids, `apart` from each other: of a text, or of the shipped one but for what the claim measures."""
    rows = rows_between(tokenizer, text, [] if text else measured_places(tokenizer), tokens, apart)
    return [row for first in range(STRIDE) for row in rows[first::STRIDE]]


def main() -> None:
    given = arguments()
    model, tokenizer = models.load(given.model, dtype=given.dtype, device=given.device)
    text = given.text.read_text(encoding="utf-8") if given.text else None
    rows = spared(tokenizer, text, given.tokens, given.apart or given.tokens)[: given.rows]
    options = {"train_parts": given.parts, "train_steps": given.steps, "train_texts": given.texts}
    method = SeerAttention(block_tokens=given.block, **options)
    distil(method, model, rows, given.text.stem if given.text else WITHOUT, given)


if __name__ == "__main__":
    main()
