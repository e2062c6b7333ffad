"""HaloNet: a halo around each block helps, soon enough of it; a window for a block is cheaper than for each cell."""

from __future__ import annotations

import torch

from saccade.claims._bench import TIERS, at_least
from saccade.claims._contract import Claim, Evidence, Progress
from saccade.claims._pictures import layer_machinery, now, trained
from saccade.claims._seeds import surely_above, surely_at_least
from saccade.core import rng
from saccade.measure.stats import Estimate, mean_interval
from saccade.methods.mixers._halo import Halo, halo_attention
from saccade.methods.mixers._windows import Axis, Windows
from saccade.methods.mixers.faster_neighborhood import neighborhood_attention

CLAIM = Claim(
    says="Attention of blocks over themselves and a halo reaches the accuracy of far larger convolutional nets; without"
    " the halo it is worse, and more than a few cells of it bring little; one window for a block is several times"
    " faster than one for each cell.",
    where="arXiv 2103.12731, sections 3 and 5: halo sizes, and speed of blocked against per-cell local attention",
    setting="ImageNet, pictures of 256 to 600, blocks of 8 and halos of 3, H0 to H7 on TPUs",
    how="The small net on digits of 8 x 8 pixels, blocks of 2 x 2, halos of 0, 1 and 2, 5 seeds, 150 steps; beside full"
    " attention and as many random keys as a halo of 1 has. And the layer on a map of 32 x 32 with blocks of 8 and a"
    " halo of 3 against the same cells copied for every query, float32, one thread. The whole nets are built, and their"
    " parameters counted in the tests, but not trained: that takes ImageNet.",
    counts="A halo of 1 is above none by the whole interval and above random keys; a halo of 2 brings less on top of it"
    " than it brought; a window for each block is at least 3 times as fast as copied keys.",
    tiers=("smoke", "cpu", "gpu"),
)
HALOS, ROUNDS, HEADS, SIZE = (0, 1, 2), 5, 4, 32
ARMS = {f"halo {h}": f"halonet:block=2,halo={h}" for h in HALOS}


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return layer_machinery("halonet:block=2,halo=1")
    ours, copied = _seconds(tier)
    found = trained(tier, ARMS, 16, progress)
    gained, more = found.above("halo 1", "halo 0"), found.above("halo 2", "halo 1")
    both = [(b - a) - (c - b) for a, b, c in zip(*(found.scores[arm] for arm in ARMS))]
    checks = [
        surely_above("accuracy, a halo of 1 minus none", gained),
        surely_at_least("accuracy, a halo of 1 minus random keys", found.above("halo 1", "random"), 0.0),
        surely_at_least("accuracy, gain of the first cell minus that of the second", mean_interval(both), 0.0),
        at_least("times as fast as copied keys", _times(copied, ours), 3.0),
    ]
    rows = [{"who": n, "seconds": mean_interval(s).mean} for n, s in {"blocks": ours, "copied keys": copied}.items()]
    setting = f"{found.setting}; 16 of 64 keys with a halo of 1"
    reason = f"A second cell of halo brings {more.mean:+.3f}, full attention {found.above('full', 'halo 1').mean:+.3f}."
    return Evidence(checks, setting, reason, table=found.table + rows)


@torch.no_grad()
def _seconds(tier: str) -> tuple[list[float], list[float]]:
    """For the layer's attention and for as wide a window that is copied for each query."""
    halo, draw = Halo((32, 32), 8, 3), rng.generator("claims/halonet")
    q, k, v = (torch.randn(1, HEADS, 32 * 32, SIZE, generator=draw).to(TIERS[tier].device) for _ in range(3))
    tables = [torch.randn(2 * halo.window - 1, SIZE, generator=draw).to(q.device) for _ in range(2)]
    each = Windows((Axis(32, halo.window), Axis(32, halo.window)))
    out: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):
        for seconds, work in zip(out, (lambda: halo_attention(q, k, v, tables, halo),
                                       lambda: neighborhood_attention(q, k, v, each, "naive"))):  # fmt: skip
            began = now(tier)
            work()
            seconds.append(now(tier) - began)
    return out[0][1:], out[1][1:]


def _times(slow: list[float], fast: list[float]) -> Estimate:
    return mean_interval([a / b for a, b in zip(slow, fast)])
