"""Native Sparse Attention: trained from the beginning, its three looks are as good as full attention."""

from __future__ import annotations

import math

from saccade.claims._contract import Claim, Evidence, Progress
from saccade.claims._planted import WINDOW, Scores, Study, by_seed, machinery, rows, window
from saccade.claims._seeds import less, surely_at_least, surely_at_most, training

CLAIM = Claim(
    says="A model pretrained with compressed, selected and windowed attention under gates matches or surpasses one with"
    " full attention, and finds every needle.",
    where="arXiv 2502.11089, section 4: benchmarks, LongBench and needle in a haystack at 64k tokens",
    setting="27B parameters, 3B of them active, 260B tokens of 8k; blocks of 32 at every 16, 16 selected of 64, window"
    " 512",
    how="Nets of 2 layers and 32 channels, trained on 192 bytes of Moby-Dick each, in which one of four needles is"
    " planted and asked for in the last 4 places; blocks of 8, 4 selected, window 8, 5 seeds. Against full attention,"
    " and a window and random blocks of as many pairs. Scaled down very far: no speed, and a text is hardly longer than"
    " what is read of it.",
    counts="Needles within 5 points of full attention, 30 above the window and no worse than random blocks; perplexity"
    " within 2 % of full attention.",
    tiers=("smoke", "cpu", "gpu"),
)
OURS = "native-sparse-attention:block_tokens=8,stride_tokens=8,select_tokens=8,select_blocks=4,window_tokens=8"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery("native-sparse-attention")
    study = Study(192, **training(tier, 4, 240), progress=progress)
    tests = study.tests(192)
    found = {"full": Scores.of(study.trained("full"), tests), "native": Scores.of(study.trained(OURS), tests)}
    pairs = found["native"].pairs
    for who, mixer, budget in (("window", WINDOW, window(pairs, 192)), ("random", "random:block_tokens=8", pairs)):
        found[who] = Scores.of(study.trained(mixer, budget), tests)
    hits, nats = ({who: getattr(x, what) for who, x in found.items()} for what in ("hits", "nats"))
    checks = [
        surely_at_least("needles, minus full", less(hits["native"], hits["full"]), -0.05),
        surely_at_least("needles, minus a window", less(hits["native"], hits["window"]), 0.30),
        surely_at_least("needles, minus random blocks", less(hits["native"], hits["random"]), 0.0),
        surely_at_most("nats per byte, minus full (2 %)", less(nats["native"], nats["full"]), math.log(1.02)),
    ]
    return Evidence(checks, study.setting("texts of 192 bytes"), by_seed(found), table=rows(found))
