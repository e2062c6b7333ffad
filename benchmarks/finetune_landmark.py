"""Train landmark tokens on a model with real text, and write what was trained.

    PYTHONPATH=src python benchmarks/finetune_landmark.py --device cuda --dtype bfloat16 --steps 500 --out OUT

The model's weights stay; what learns are the landmark's embedding and low-rank changes of the projections of attention.
A step reads some rows of `--tokens` tokens of the text, with a landmark after every 63; half of the rows hold pass keys
of words, which are asked for at the end. The last tenth of the text is left out and measured before and after.
Interrupted, the same command goes on from the last 50 steps. OUT then holds NAME.safetensors and NAME.json, NAME being
the model's: `saccade claim landmark --tier gpu` reads pass keys beyond the training length with them.
On two threads of a CPU `--tokens 126 --rows 1 --steps 2` shows in a minute that it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from saccade import models
from saccade.attach.gates import recall_text
from saccade.attach.landmarks import Landmarks
from saccade.attach.resuming import SAVED_EVERY, resume, state
from saccade.core import rng
from saccade.core.artefact import Draft
from saccade.core.paths import cache_dir
from saccade.tasks import moby_dick

KEYS, WORDS = 2, 2  # pass keys of a row, and words of each
WARM_UP, CLIP = 20, 1.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of the model; what is trained is float32")
    parser.add_argument("--text", type=Path, help="a long plain text (the shipped one)")
    parser.add_argument("--tokens", type=int, default=1008, help="of a row, landmarks not among them")
    parser.add_argument("--block", type=int, default=64, help="tokens of a block, its landmark among them")
    parser.add_argument("--rank", type=int, default=16, help="of the changes")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest; it falls along a line")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artefact")
    return parser.parse_args()


def row(tokenizer: Any, ids: torch.Tensor, tokens: int, step: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of the text from a random place; every other one with pass keys. True at the tokens of their answers."""
    draw = rng.python("landmarks/rows", step, index)
    start = draw.randrange(ids.shape[1] - tokens + 1)
    some = ids[:, start : start + tokens]
    if index % 2:
        return recall_text(tokenizer, some, draw, KEYS, WORDS, shortest=1.0)
    return some, torch.zeros_like(some, dtype=torch.bool)


@torch.no_grad()
def losses(landmarks: Landmarks, rows: list[torch.Tensor], read_blocks: int) -> float:
    """Nats per token of rows that are not trained on."""
    found = []
    for ids in rows:
        wanted = ids[:, 1:].to(landmarks.subject.model.device)
        found.append(torch.nn.functional.cross_entropy(landmarks.logits(ids, read_blocks).float().mT, wanted))
    return round(float(torch.stack(found).mean()), 4)


def train(landmarks: Landmarks, tokenizer: Any, ids: torch.Tensor, given: argparse.Namespace, draft: Draft) -> None:
    """All steps, from the last that was kept."""
    optimiser, began = torch.optim.AdamW(landmarks.weights.values(), weight_decay=0.0), time.perf_counter()
    done = resume(draft.load("training"), landmarks.weights, optimiser)
    for step in range(len(done), given.steps):
        optimiser.param_groups[0]["lr"] = given.rate * min(1.0, (step + 1) / WARM_UP) * (1 - step / given.steps)
        rows = [row(tokenizer, ids, given.tokens, step, i) for i in range(given.rows)]
        done.append(landmarks.step(*(torch.cat(x) for x in zip(*rows))))
        torch.nn.utils.clip_grad_norm_(landmarks.weights.values(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % 10 == 0 or step + 1 == given.steps:
            spent = time.perf_counter() - began
            print(f"{step + 1}/{given.steps} loss {done[-1]:.4f}, {spent:.0f} s", file=sys.stderr, flush=True)
        if (step + 1) % SAVED_EVERY == 0:
            draft.save("training", state(done, landmarks.weights, optimiser))


def main() -> None:
    given = arguments()
    model, tokenizer = models.load(given.model, dtype=given.dtype, device=given.device)
    text = given.text.read_text(encoding="utf-8") if given.text else moby_dick()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    cut = ids.shape[1] * 9 // 10
    kept = [x for x in ids[:, cut:].split(given.tokens, 1) if x.shape[1] == given.tokens][:4]
    landmarks = Landmarks(model, given.block, given.rank)
    said = "-".join(f"{n}{getattr(given, n)}" for n in ("tokens", "block", "rank", "rows", "steps", "rate"))
    draft = Draft(cache_dir("drafts") / "landmark" / f"{landmarks.subject.fingerprint}-{cut}-{said}")
    with torch.no_grad():
        plain = sum(float(model(x.to(given.device), labels=x.to(given.device)).loss) for x in kept) / len(kept)
    figures = {"nats_of_the_model": round(plain, 4), "nats_at_first": losses(landmarks, kept, 0)}
    train(landmarks, tokenizer, ids[:, :cut], given, draft)
    figures |= {"nats": losses(landmarks, kept, 0), "nats_of_4_blocks": losses(landmarks, kept, 4)}
    figures |= {"tokens": given.tokens, "steps": given.steps, "rows": given.rows}
    name = given.text.stem if given.text else "nine tenths of the shipped text"
    made = landmarks.artefact(f"{name}, half of the rows with pass keys of words, {given.dtype}", figures)
    path = made.save(given.out / made.model)
    draft.clear()
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {figures}")


if __name__ == "__main__":
    main()
