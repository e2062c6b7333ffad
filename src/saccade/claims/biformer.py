"""BiFormer: regions that were chosen by content serve as well as all cells, and better than near or random ones."""

from __future__ import annotations

from saccade.claims._contract import Claim, Evidence, Progress
from saccade.claims._pictures import layer_machinery, share, trained
from saccade.claims._seeds import surely_at_least

CLAIM = Claim(
    says="A backbone with bi-level routing attention is more accurate than nets with hand-made sparse attention of the"
    " same cost: BiFormer-S 83.8 with 25.5M parameters, and in the layout of Swin-T 82.7 against its 81.3.",
    where="arXiv 2303.08810, section 5, tables 2 and 6: ImageNet top-1; ablation with the layout of Swin-T",
    setting="ImageNet at 224 pixels, 300 epochs; 7 x 7 regions, 1, 4, 16 and all of them in the four stages",
    how="The small net on digits of 8 x 8 pixels, 16 regions of 2 x 2 of which 4 are chosen, 5 seeds, 150 steps; beside"
    " full attention, 4 x 4 windows that do not meet, windows of 4 x 4 around each cell, and random keys, all of them"
    " 16 of 64 keys. To tell routing from the convolution over the values, also without that. Digits ask for little"
    " that is far away: scaled down very far. The whole nets are built, their parameters counted in the tests, and not"
    " trained: that takes ImageNet.",
    counts="At most 2 points below full; not below windows that do not meet, windows around each cell, nor random keys;"
    " without the convolution not below random keys.",
    tiers=("smoke", "cpu", "gpu"),
)
ARMS = {
    "biformer": "biformer",
    "routing alone": "biformer:lepe=0",
    "windows": "halonet:block=4,halo=0",
    "around each cell": "faster-neighborhood:kernel=4",
}


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return layer_machinery("biformer")
    found = trained(tier, ARMS, 16, progress)
    bars = {"full": -0.02, "windows": 0.0, "around each cell": 0.0, "random": 0.0}
    checks = [surely_at_least(f"accuracy minus {n}", found.above("biformer", n), bar) for n, bar in bars.items()]
    checks.append(surely_at_least("accuracy, routing alone minus random", found.above("routing alone", "random"), 0.0))
    setting = f"{found.setting}; {share(16, 64)}"
    gained = found.above("biformer", "routing alone").mean
    return Evidence(checks, setting, f"The convolution over the values is worth {gained:+.3f}.", table=found.table)
