"""Landmark Attention: trained on short texts, it finds a needle in long ones through two blocks of each token."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from saccade.attach.landmarks import Landmarks
from saccade.claims._bench import Bench, at_least
from saccade.claims._contract import Check, Claim, Evidence, Progress
from saccade.claims._planted import MARK, WINDOW, Scores, Study, by_seed, machinery, rows, window
from saccade.claims._seeds import less, surely_at_least, surely_at_most, training
from saccade.core.artefact import Artefact
from saccade.measure.stats import hit_rate
from saccade.methods.mixers.landmark import with_landmarks

CLAIM = Claim(
    says="Landmarks trained on short texts retrieve blocks from texts many times as long: a few blocks are as good as"
    " full attention, and context is extended without training on it.",
    where="arXiv 2305.16300, section 4: 2 or 4 blocks of 50 tokens; LLaMA 7B from 2k to 32k tokens",
    setting="12 layers of 1,024 channels trained at 512 tokens; LLaMA 7B tuned for 15,000 steps",
    how="Nets of 2 layers and 32 channels, trained on 60 tokens of Moby-Dick with a landmark after every 7 bytes, in"
    " which one of four needles is planted and asked for in the last 4 places; 5 seeds. Read with 2 blocks of each"
    " token, at 60 tokens and at 508. Full attention is trained on the same tokens; its weights are read at 508 tokens"
    " as they are, through a window and through random blocks of as many pairs. Scaled down very far. At tier gpu, if"
    " landmarks were trained for it (benchmarks/finetune_landmark.py, rows of 1,024 tokens of the same book), SmolLM2"
    " finds pass keys in 4,096 and 8,192 tokens with 4 blocks of each token, beside full attention, and a window and"
    " random keys of as many held.",
    counts="With 2 blocks at 508 tokens, needles within 5 points of what full attention finds at 60, and 30 above a"
    " window and random blocks at 508; perplexity at 60 within 5 % of full attention. SmolLM2 finds 9 of 10"
    " pass keys, 30 points more than with the window and no more than 5 less than with full attention; perplexity on"
    " text left out within 5 % of what it was.",
    tiers=("smoke", "cpu", "gpu"),
)
BLOCK, SHORT, LONG = 8, 53, 445  # bytes; with landmarks 60 and 508 tokens
OURS = f"landmark:block_tokens={BLOCK}"
READ = 4  # blocks, of SmolLM2


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(OURS)
    layout = functools.partial(with_landmarks, landmark=MARK, block_tokens=BLOCK)
    study = Study(SHORT, **training(tier, 8, 120), layout=layout, progress=progress)
    short, long = study.tests(SHORT), study.tests(LONG)
    full, ours = study.trained("full"), study.trained(OURS)
    two = study.others(ours, f"{OURS},read_blocks=2")
    found = {
        "full": Scores.of(full, short),
        "landmarks, all blocks": Scores.of(ours, short),
        "landmarks, 2 blocks": Scores.of(two, short),
        "full, long": Scores.of(full, long),
        "landmarks, 2 blocks, long": Scores.of(two, long),
    }
    far = found["landmarks, 2 blocks, long"]
    near = window(far.pairs, long.ids.shape[1])
    for who, mixer, budget in (("window, long", WINDOW, near), ("random", "random:block_tokens=8", far.pairs)):
        found[who] = Scores.of(study.others(full, mixer, budget), long)
    checks = [
        surely_at_least("needles, 2 blocks at 508 minus full at 60", less(far.hits, found["full"].hits), -0.05),
        surely_at_least("needles at 508, minus a window", less(far.hits, found["window, long"].hits), 0.30),
        surely_at_least("needles at 508, minus random blocks", less(far.hits, found["random"].hits), 0.30),
        surely_at_most("nats per byte at 60, minus full (5 %)",
                less(found["landmarks, all blocks"].nats, found["full"].nats), math.log(1.05)),
    ]  # fmt: skip
    setting, reason, table = study.setting("texts of 60 tokens"), by_seed(found), rows(found)
    if tier == "gpu":
        more, about, said, lines = _tuned(progress)
        checks, setting, reason, table = checks + more, setting + about, f"{reason} {said}", table + lines
    return Evidence(checks, setting, reason, table=table)


def _tuned(progress: Progress | None) -> tuple[list[Check], str, str, list[dict[str, Any]]]:
    """SmolLM2 beyond the length that its landmarks were trained at: checks, setting, reason and lines of the table."""
    keys = Bench("passkey", (1024, 2048), 7, progress, tier="gpu")
    made = Artefact.find("landmark", keys.mark)
    if made is None:
        return [], "", "For SmolLM2 no landmarks were trained.", []
    landmarks, was = Landmarks(keys.model, made=made), made.figures
    held = f"{(READ + 1) * landmarks.block_tokens}tok"
    full, near = keys.scores("full"), keys.scores("streaming", held)
    keys.scores("random:part=evict", held)
    ours = [_found(landmarks, keys, sample) for sample in keys.samples]
    lost, bar = was["nats"] - was["nats_of_the_model"], math.log(1.05)
    checks = [
        at_least("SmolLM2: pass keys with 4 blocks", hit_rate(ours), 0.9),
        at_least("SmolLM2: pass keys minus a window of as many", keys.difference(ours, near), 0.3),
        at_least("SmolLM2: pass keys minus full", keys.difference(ours, full), -0.05),
        Check("SmolLM2: nats on text left out, minus before (5 %)", lost, lost, lost, bar, lost <= bar),
    ]
    about = f"; {keys.where()}, {keys.what()}, {was['steps']} steps of {was['rows']} rows of {was['tokens']} tokens"
    where = [hit_rate([x for x, s in zip(ours, keys.samples) if s.facts["tokens"] == n]).mean for n in keys.lengths]
    said = " ".join(f"SmolLM2 found {x:.2f} of the keys at {n:,} tokens." for x, n in zip(where, keys.lengths))
    row = {"task": "passkey", "who": f"landmarks, {READ} blocks", "n": len(ours), "mean": hit_rate(ours).mean}
    return checks, about, said, [*keys.rows(), row, dict(was)]


@torch.no_grad()
def _found(landmarks: Landmarks, keys: Bench, sample: Any) -> float:
    """Score of one sample: the answer is read with the question, as other contestants read it."""
    ids = torch.cat([sample.context, sample.continuation], 1)
    logits = landmarks.logits(ids, READ, last=sample.continuation.shape[1])
    return float(keys.task.score(logits[0].float().cpu(), sample))
