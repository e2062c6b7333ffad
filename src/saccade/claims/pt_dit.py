"""PT-DiT: few proxies carry what is global, shifted windows the rest; noise is predicted as by full attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saccade.claims._contract import Check, Claim, Evidence, Progress
from saccade.claims._seeds import less, surely_above, surely_at_most, trained, training
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.method import Slot
from saccade.measure.stats import mean_interval
from saccade.methods.nets import make_mixer
from saccade.methods.nets._models import drawn
from saccade.methods.nets.pt_dit import MODULATIONS, PtDit, norm
from saccade.tasks.training import Batch, get

CLAIM = Claim(
    says="Diffusion transformers that attend globally among one proxy a cell, with cross-attention and shifted windows,"
    " need about half of the computation and are as good; without proxies they are not.",
    where="arXiv 2409.04005, abstract, sections 3 and 4 and its ablations: 48 to 49 % less than DiT",
    setting="text to image at 256 to 2,048 pixels, windows of 8 x 8 latents and cells of 4 x 4; 32 million weights on"
    " ImageNet at the smallest",
    how="Noise prediction on the shipped digits of 8 x 8 pixels, class and time given by modulation: two blocks of 64"
    " channels, windows and cells of 2 x 2, 150 steps from 5 seeds; in their place full attention, random"
    " blocks of as many logits, and the same blocks without proxies. Mean squared error on held-out digits under the"
    " same noise. The share of logits at 1,024 tokens by counting. So few tokens test the ordering, not the speed.",
    counts="Error within 3 % of full attention's, below that without proxies and that of random blocks; at 1,024 tokens"
    " with windows of 8 and cells of 4 at most a fifth of the logits.",
    tiers=("smoke", "cpu", "gpu"),
)
SIDE, WINDOW, CELL, CHANNELS, LAYERS, CLASSES = 8, 2, 2, 64, 2, 10
STEPS, ROWS, RATE, TIMES = 150, 32, 2e-3, 1000
MLP = 3  # shift, scale and gate of it


class Dense(nn.Module):
    """A block's mixing by one attention layer, modulated as a window is."""

    def __init__(self, slot: Slot, name: str):
        super().__init__()
        self.mixer = make_mixer(name, slot)

    def forward(self, x, modulation):
        shift, scale, gate = modulation[:, :3, None].unbind(1)
        return gate * self.mixer(norm(x) * (1 + scale) + shift)[0]


class Proxies(nn.Module):
    """A block's mixing by PT-DiT; `spread` stays at 0 where there are to be no proxies."""

    def __init__(self, slot: Slot, proxies: bool = True):
        super().__init__()
        self.mixer = PtDit(slot, window_side=WINDOW, proxy_side=CELL)
        self.mixer.spread.requires_grad_(proxies)

    def forward(self, x, modulation):
        return self.mixer(x, modulation=modulation)[0]


class Denoiser(nn.Module):
    """Noisy pictures, times and classes to the noise in them; one network of the time modulates all blocks."""

    def __init__(self, mixing: Callable[[Slot], nn.Module], budget: float, seed: int):
        super().__init__()
        c, many = CHANNELS, MODULATIONS + MLP
        with drawn(seed, "denoiser"):
            self.pixels, self.last = nn.Linear(1, c), nn.Linear(c, 1)
            self.places, self.classes = nn.Embedding(SIDE * SIDE, c), nn.Embedding(CLASSES, c)
            self.time = nn.Sequential(nn.Linear(c, c), nn.SiLU(), nn.Linear(c, many * c))
            self.tables = nn.ParameterList(torch.randn(many, c) / math.sqrt(c) for _ in range(LAYERS))
            self.mlps = nn.ModuleList(_mlp() for _ in range(LAYERS))
        where = {"causal": False, "grid": (SIDE, SIDE), "layers": LAYERS, "seed": seed, "budget": Budget(budget)}
        with drawn(seed, "mixing"):
            self.mixing = nn.ModuleList(mixing(Slot(c, 4, layer=i, **where)) for i in range(LAYERS))

    def forward(self, x: Float[Tensor, "b n 1"], time: Int[Tensor, " b"], label: Int[Tensor, " b"]) -> Tensor:
        x = self.pixels(x) + self.places.weight
        said = self.time(_waves(time) + self.classes(label)).unflatten(-1, (MODULATIONS + MLP, CHANNELS))
        for table, mix, mlp in zip(self.tables, self.mixing, self.mlps):
            modulation = said + table
            x = x + mix(x, modulation[:, :MODULATIONS])
            shift, scale, gate = modulation[:, MODULATIONS:, None].unbind(1)
            x = x + gate * mlp(norm(x) * (1 + scale) + shift)
        return self.last(norm(x))


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return _smoke()
    arms: dict[str, Callable[[Slot], nn.Module]] = {
        "full": lambda slot: Dense(slot, "full"),
        "pt-dit": Proxies,
        "without proxies": lambda slot: Proxies(slot, proxies=False),
        "random": lambda slot: Dense(slot, "random"),
    }
    errors: dict[str, list[float]] = {}
    how = training(tier, ROWS, STEPS)
    seeds = how["seeds"]
    for i, (name, mixing) in enumerate(arms.items()):
        for seed in range(seeds):
            if progress is not None:
                progress(i * seeds + seed, len(arms) * seeds, f"{name}, seed {seed}")
            net = Denoiser(mixing, share(SIDE * SIDE, WINDOW, CELL), seed).to(how["device"])
            errors.setdefault(name, []).append(_trained(net, seed, how))
    ours = errors["pt-dit"]
    near = less(ours, [1.03 * x for x in errors["full"]])
    checks = [surely_at_most("error, minus 1.03 times full", near, 0.0)]
    for name in ("without proxies", "random"):
        checks.append(surely_above(f"error, {name} minus ours", less(errors[name], ours)))
    logits = share(1024, 8, 4)
    checks.append(Check("logits over dense, 1,024 tokens", logits, logits, logits, 0.2, logits <= 0.2))
    table = [{"who": name, "error": mean_interval(found).mean} for name, found in errors.items()]
    setting = f"{LAYERS} blocks of {CHANNELS} channels, {trained(how, 'digits')}"
    reason = f"On 64 tokens ours has {share(SIDE * SIDE, WINDOW, CELL):.2f} of the logits of full attention."
    return Evidence(checks, setting, reason, table=table)


def share(tokens: int, window: int, cell: int) -> float:
    """Logits of a block over those of dense attention: M^2 + N M + 2 N c^2 over N^2, M = N / p^2."""
    proxies = tokens / cell**2
    return (proxies**2 + tokens * proxies + 2 * tokens * window**2) / tokens**2


def _trained(net: Denoiser, seed: int, how: dict[str, Any]) -> float:
    """Mean squared error on held-out digits, after training."""
    task, steps = get("digits"), how["steps"]
    optimiser = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 30) * (1 - 0.9 * step / steps)
        batch = task.batch(step, how["rows"], seed)
        loss = _error(net, batch, rng.generator("claims/pt-dit", seed, step))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        kept = enumerate(task.held_out(ROWS))
        found = [float(_error(net.eval(), b, rng.generator("claims/pt-dit/held-out", 0, i))) for i, b in kept]
    return sum(found) / len(found)


def _error(net: Denoiser, batch: Batch, draw: torch.Generator) -> Float[Tensor, ""]:
    """Of the noise predicted, at random times."""
    x = 2 * batch.inputs.flatten(1)[..., None] - 1
    time = torch.randint(TIMES, (len(x),), generator=draw)
    noise = torch.randn(x.shape, generator=draw)
    share_left = _kept()[time][:, None, None]
    noisy = share_left.sqrt() * x + (1 - share_left).sqrt() * noise
    noisy, time, labels, noise = (t.to(net.places.weight.device) for t in (noisy, time, batch.targets, noise))
    return (net(noisy, time, labels) - noise).square().mean()


def _kept() -> Float[Tensor, " times"]:
    """How much of a picture's square is left at each time: a linear schedule."""
    return (1 - torch.linspace(1e-4, 0.02, TIMES)).cumprod(0)


def _waves(time: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
    angle = time[:, None] * 10_000 ** -(torch.arange(CHANNELS // 2, device=time.device) * 2 / CHANNELS)
    return torch.cat([angle.sin(), angle.cos()], -1)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(CHANNELS, 4 * CHANNELS), nn.GELU("tanh"), nn.Linear(4 * CHANNELS, CHANNELS))


def _smoke() -> Evidence:
    """The block is itself written out, and at first attention in windows alone; it says nothing about the paper."""
    slot: Any = Slot(16, 4, causal=False, grid=(4, 8))
    x, checks = torch.randn(1, 32, 16, generator=rng.generator("smoke"), dtype=torch.float64), []
    for layout in ("cell", "ref"):
        with drawn(0, "smoke"), torch.no_grad():
            layer = PtDit(slot, proxy_layout=layout).double()
            first = layer(x)[0]
            nn.init.normal_(layer.spread.weight)
            y = layer(x)[0]
            apart, moved = float((y - layer.reference(x)).abs().max()), float((y - first).abs().max())
        bar = torch.finfo(torch.float32).eps
        checks.append(Check(f"{layout}: difference from the equation", apart, apart, apart, bar, apart <= bar))
        checks.append(Check(f"{layout}: what proxies add", moved, moved, moved, bar, moved > bar))
    same = share(SIDE * SIDE, WINDOW, CELL)
    table = [{"who": who, "logits": part} for who, part in (("full", 1.0), ("random", same))]
    return Evidence(checks, "random weights, 32 tokens: the machinery, not the paper", table=table)
