"""Landmark Attention: trained on short texts, it finds a needle in long ones through two blocks of each token."""

from __future__ import annotations

import functools
import math

from saccade.claims._contract import Claim, Evidence, Progress
from saccade.claims._planted import MARK, WINDOW, Scores, Study, by_seed, machinery, rows, window
from saccade.claims._seeds import less, surely_at_least, surely_at_most, training
from saccade.methods.mixers.landmark import with_landmarks

CLAIM = Claim(
    says="Landmarks trained on short texts retrieve blocks from texts many times as long: a few blocks are as good as"
    " full attention, and context is extended without training on it.",
    where="arXiv 2305.16300, section 4: 2 or 4 blocks of 50 tokens; LLaMA 7B from 2k to 32k tokens",
    setting="12 layers of 1,024 channels trained at 512 tokens; LLaMA 7B tuned for 15,000 steps",
    how="Nets of 2 layers and 32 channels, trained on 60 tokens of Moby-Dick with a landmark after every 7 bytes, in"
    " which one of four needles is planted and asked for in the last 4 places; 5 seeds. Read with 2 blocks of each"
    " token, at 60 tokens and at 508. Full attention is trained on the same tokens; its weights are read at 508 tokens"
    " as they are, through a window and through random blocks of as many pairs. Scaled down very far.",
    counts="With 2 blocks at 508 tokens, needles within 5 points of what full attention finds at 60, and 30 above a"
    " window and random blocks at 508; perplexity at 60 within 5 % of full attention.",
    tiers=("smoke", "cpu", "gpu"),
)
BLOCK, SHORT, LONG = 8, 53, 445  # bytes; with landmarks 60 and 508 tokens
OURS = f"landmark:block_tokens={BLOCK}"


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
    return Evidence(checks, f"{study.setting()} of 60 tokens", by_seed(found), table=rows(found))
