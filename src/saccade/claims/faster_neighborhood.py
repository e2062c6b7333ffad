"""Neighborhood attention: the fused form beats stored weights, and those beat copied keys; near cells are enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from saccade import ops
from saccade.claims._bench import TIERS, at_least
from saccade.claims._contract import Check, Claim, Evidence, Progress
from saccade.claims._pictures import layer_machinery, now, share, trained
from saccade.claims._seeds import surely_at_least
from saccade.core import rng
from saccade.core.selection import dense
from saccade.measure.stats import Estimate, mean_interval
from saccade.methods.mixers._windows import Axis, Windows
from saccade.methods.mixers.faster_neighborhood import neighborhood_attention

CLAIM = Claim(
    says="Neighborhood attention as matrix products of tiles is much faster than the naive kernels, and fused without"
    " stored weights much faster still: in half precision by 496 % (1-D) and 113 % (2-D), fused by 1607 % and 581 %.",
    where="arXiv 2403.04690, abstract and section 5: averages over problem sizes, forward",
    setting="A100, FP16, kernels in CUTLASS; against kernels that compute each query by itself. Percent faster: 1607 %"
    " is 17 times as fast",
    how="The three forms: keys of every query copied, tiles with stored weights, `ops.attend` over windows; beside them"
    " dense attention. On a GPU a line of 8,192 with windows of 255 and 64 x 64 with 13 x 13, bfloat16; on a processor"
    " a line of 2,048 and 48 x 48 with the same windows, float32, one thread. And the layer is trained on digits"
    " of 8 x 8 pixels, 5 seeds, windows of 3 x 3: against full, as many random keys, and the same windows as blocks.",
    counts="Fused at least 10 times as fast as naive on a line and 5 times on a plane, unfused between them in both;"
    " trained at most 2 points below full, and above random keys and blocks.",
    tiers=("smoke", "cpu", "gpu"),
)
SIDES = {
    "cpu": {"line": ((2048, 255),), "plane": ((48, 13), (48, 13))},
    "gpu": {"line": ((8192, 255),), "plane": ((64, 13), (64, 13))},
}
BARS = {"line": 10.0, "plane": 5.0}
REASON = (
    "On a processor `ops.attend` has no kernel of its own for windows: it computes tiles under a mask, and plain"
    " products win; dense attention by PyTorch's kernel is faster than any of them at these lengths."
)
ROUNDS, HEADS, SIZE = 5, {"cpu": 2, "gpu": 4}, {"cpu": 32, "gpu": 64}
ARMS = {
    "faster-neighborhood": "faster-neighborhood:kernel=3",
    "blocks": "faster-neighborhood:kernel=3,stride=3",
}


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier."""
    if tier == "smoke":
        return layer_machinery("faster-neighborhood:kernel=3")
    checks, table = [], []
    for name, sides in SIDES[tier].items():
        seconds = _seconds(tier, Windows(tuple(Axis(*side) for side in sides)))
        faster = {form: _times(seconds["naive"], seconds[form]) for form in ("fused", "unfused")}
        less = _times(seconds["unfused"], seconds["fused"])
        checks += [
            at_least(f"{name}: times as fast as naive, fused", faster["fused"], BARS[name]),
            _between(f"{name}: times as fast as naive, unfused", faster["unfused"], less),
        ]
        table += [{"who": f"{form}, {name}", "seconds": mean_interval(s).mean} for form, s in seconds.items()]
    found = trained(tier, ARMS, 9, progress)
    checks += [
        surely_at_least("accuracy minus full", found.above("faster-neighborhood", "full"), -0.02),
        surely_at_least("accuracy minus random keys", found.above("faster-neighborhood", "random"), 0.0),
        surely_at_least("accuracy minus blocks", found.above("faster-neighborhood", "blocks"), 0.0),
    ]
    timed = f"{TIERS[tier].dtype}, {HEADS[tier]} heads of {SIZE[tier]}, {ROUNDS} rounds in turn"
    setting = f"{timed}; trained: {found.setting}, {share(9, 64)}"
    return Evidence(checks, setting, REASON if tier == "cpu" else "", table=table + found.table)


def _between(name: str, faster: Estimate, less: Estimate) -> Check:
    """Holds if it is faster than naive, and fused is faster than it."""
    return replace(at_least(name, faster, 1.0), holds=faster.mean > 1 and less.mean > 1)


@torch.no_grad()
def _seconds(tier: str, windows: Windows) -> dict[str, list[float]]:
    """Of each form, and of dense attention, round by round; the first round is not counted."""
    draw, shape = rng.generator("claims/faster-neighborhood"), (1, HEADS[tier], windows.cells, SIZE[tier])
    there = {"device": TIERS[tier].device, "dtype": getattr(torch, TIERS[tier].dtype)}
    q, k, v = (torch.randn(shape, generator=draw).to(**there) for _ in range(3))
    everything = dense(windows.cells, windows.cells, causal=False)
    forms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "naive": lambda: neighborhood_attention(q, k, v, windows, "naive"),
        "unfused": lambda: neighborhood_attention(q, k, v, windows, "unfused"),
        "fused": lambda: neighborhood_attention(q, k, v, windows),
        "dense": lambda: ops.attend(q, k, v, everything),
    }
    out: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(ROUNDS + 1):
        for form, work in forms.items():
            began = now(tier)
            work()
            out[form].append(now(tier) - began)
    return {form: seconds[1:] for form, seconds in out.items()}


def _times(slow: list[float], fast: list[float]) -> Estimate:
    return mean_interval([a / b for a, b in zip(slow, fast)])
