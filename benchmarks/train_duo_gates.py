"""Train DuoAttention's gates for a model and write the artefact.

On a GPU, with no network, from a folder that holds the model (config.json, model.safetensors, tokenizer.json) and any
long plain text as haystack:

    PYTHONPATH=src python benchmarks/train_duo_gates.py --model PATH/smollm2 --device cuda --dtype bfloat16 \
        --text PATH/haystack.txt --steps 2000 --tokens 8192 --keys 10 --key-words 16 --out OUT

That is expected to take 0.15 to 0.25 s a step on one H200 (300 to 500 s; texts are 256 to 8,192 tokens long, 4,300 on
average) and 20 GiB. `--minutes 8` stops a run that is slower: the schedule is then that of the steps that fit, measured
on the first texts. On CPUs `--steps 200 --tokens 512 --keys 5 --key-words 8` takes about ten minutes on two cores.

`--model` is a known name, a folder or a .gguf file (which needs the package gguf). Without `--text` the haystack is the
shipped text, on which the tasks measure too. Progress goes to stderr; at the end one line on stdout says how the gates
fell. OUT then holds NAME.safetensors and NAME.json, NAME being the model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import torch

from saccade import models, tasks
from saccade.attach.calibration import Subject
from saccade.attach.gates import Gating
from saccade.methods.cache.duo_attention import DuoAttention

OVERLAP = 4  # each haystack row begins a quarter of a row after the one before: a short text still gives many
TRIAL = 6  # texts that measure a step's seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model; gates are float32")
    parser.add_argument("--text", type=Path, help="a long plain text, the haystack")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="fewer steps if they would take longer")
    parser.add_argument("--tokens", type=int, default=512, help="longest training text")
    parser.add_argument("--keys", type=int, default=5, help="pass keys in a text")
    parser.add_argument("--key-words", type=int, default=8)
    parser.add_argument("--sink-tokens", type=int, default=16)
    parser.add_argument("--recent-tokens", type=int, default=64)
    parser.add_argument("--full-term", choices=["teacher", "student"], default="teacher")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefact")
    return parser.parse_args()


def haystacks(tokenizer, text: str, tokens: int) -> list[torch.Tensor]:
    """Overlapping rows of `tokens` token ids."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    return list(ids.unfold(1, tokens, max(1, tokens // OVERLAP)).unbind(1))


def affordable(subject: Subject, method: DuoAttention, rows: list[torch.Tensor], minutes: float) -> int:
    """Steps that fit into the minutes, by the seconds of a few (the first warms up)."""
    if minutes == float("inf"):
        return method.train_steps
    Gating(subject, dataclasses.replace(method, train_steps=1)).train(rows)
    start = time.perf_counter()
    Gating(subject, dataclasses.replace(method, train_steps=TRIAL)).train(rows)
    return max(1, min(method.train_steps, int(60 * minutes * TRIAL / (time.perf_counter() - start))))


def main() -> None:
    given = arguments()
    start = time.perf_counter()
    model, tokenizer = models.load(given.model, dtype=given.dtype, device=given.device)
    subject = Subject(model)
    subject.tokenizer = tokenizer
    text = given.text.read_text(encoding="utf-8") if given.text else tasks.moby_dick()
    rows = haystacks(tokenizer, text, given.tokens)
    method = DuoAttention(
        sink_tokens=given.sink_tokens,
        recent_tokens=given.recent_tokens,
        full_term=given.full_term,
        train_steps=given.steps,
        train_keys=given.keys,
        train_key_words=given.key_words,
    )
    method = dataclasses.replace(method, train_steps=affordable(subject, method, rows, given.minutes))

    def progress(done: int, total: int, what: str) -> None:
        if done % 10 == 0 or done == total:
            print(f"{done}/{total} {what}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    artefact = method.calibrate(subject, rows, progress)
    source = given.text.stem if given.text else "the shipped text"
    artefact = dataclasses.replace(artefact, data=f"pass keys in {source}: {artefact.data}, {given.dtype}")
    path = artefact.save(given.out / artefact.model)
    ranked = [round(g, 2) for g in artefact.tensors["gates"].flatten().sort().values.tolist()]
    print(f"{path}: {dict(artefact.figures)}; gates from low to high: {ranked}")


if __name__ == "__main__":
    main()
