"""Train DuoAttention's gates for a model and write the artefact.

    PYTHONPATH=src python benchmarks/train_duo_gates.py --model smollm2 --device cuda --dtype bfloat16 \
        --steps 400 --tokens 2000 --out src/saccade/artefacts/duo-attention

`--model` is a known name or a folder. `--text` is any long plain text; without it the shipped one, on which the tasks
measure too: the shipped gates were trained on later chapters. On one CPU core a step of 512 tokens takes 3 seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from saccade import models, tasks
from saccade.attach.calibration import Subject
from saccade.methods.cache.duo_attention import DuoAttention


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model; gates are float32")
    parser.add_argument("--text", type=Path, help="a long plain text, the haystack")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=512, help="longest training text")
    parser.add_argument("--sink-tokens", type=int, default=16)
    parser.add_argument("--recent-tokens", type=int, default=64)
    parser.add_argument("--full-term", choices=["teacher", "student"], default="teacher")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefact")
    return parser.parse_args()


def haystacks(tokenizer, text: str, tokens: int) -> list[torch.Tensor]:
    """The text cut into rows of `tokens` token ids, the last one dropped if shorter."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    return [row for row in ids.split(tokens, dim=1) if row.shape[1] == tokens]


def main() -> None:
    given = arguments()
    model, tokenizer = models.load(given.model, dtype=given.dtype, device=given.device)
    text = given.text.read_text(encoding="utf-8") if given.text else tasks.moby_dick()
    rows = haystacks(tokenizer, text, given.tokens)
    method = DuoAttention(
        sink_tokens=given.sink_tokens,
        recent_tokens=given.recent_tokens,
        full_term=given.full_term,
        train_steps=given.steps,
    )
    start = time.perf_counter()

    def progress(done: int, total: int, what: str) -> None:
        print(f"\r{done}/{total} {what}, {time.perf_counter() - start:.0f} s", end="", file=sys.stderr, flush=True)

    artefact = method.calibrate(Subject(model), rows, progress)
    path = artefact.save(given.out / artefact.fingerprint)
    print(f"\n{path}: {dict(artefact.figures)}")


if __name__ == "__main__":
    main()
