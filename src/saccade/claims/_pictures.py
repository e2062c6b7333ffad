"""What claims on layers for pictures share: training in the small net, and keys at random as the thing to beat."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saccade.claims._contract import SEED, Check, Evidence, Progress
from saccade.claims._seeds import less, scores, silent, training
from saccade.claims._seeds import trained as words
from saccade.core import rng
from saccade.core.card import Card
from saccade.core.method import Slot, Sparse
from saccade.core.selection import Gather, Selection
from saccade.core.site import Site
from saccade.measure.stats import Estimate
from saccade.measure.training import train
from saccade.methods.nets import Spec, VisionModel, make_mixer
from saccade.methods.nets._models import drawn
from saccade.tasks.training import get


@dataclass(frozen=True)
class RandomKeys(Sparse):
    """Each query sees itself and so many other cells, drawn once for each head and layer, before or behind it."""

    card = Card(name="random", title="Random keys", family="sparse", paper="", year=2026, summary="Keys at random.")

    row_tokens: int = 9

    def select(self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site) -> Selection:
        draw = torch.rand(site.heads, site.queries, site.keys, generator=rng.generator("claims/keys", 0, site.layer))
        draw.diagonal(dim1=1, dim2=2).fill_(2.0)
        index = draw.topk(self.row_tokens, -1).indices.int()[None]
        return Gather(index=index.to(q.device), queries=site.queries, keys=site.keys, causal=False)


@dataclass(frozen=True)
class Trained:
    """Scores of every arm, seed by seed."""

    scores: Mapping[str, list[float]]
    table: list[dict[str, Any]]
    setting: str

    def above(self, one: str, other: str) -> Estimate:
        """Accuracy of one minus that of another, seed by seed."""
        return less(self.scores[one], self.scores[other])


def trained(tier: str, arms: Mapping[str, Spec], row_tokens: int, progress: Progress | None) -> Trained:
    """Arms trained on digits in the small net, beside full attention and as many random keys; nothing stays on disk."""
    who = {**arms, "random": RandomKeys(row_tokens=row_tokens)}
    how = training(tier, 32, 150)
    with tempfile.TemporaryDirectory() as folder:
        found = train("digits", who, folder, channels=32, progress=progress or silent, **how)
    lines = found["mixers"]
    rows = [{"who": x["mixer"], "accuracy": x["score"]["mean"], "parameters": x["parameters"]} for x in lines]
    return Trained(scores(found), rows, f"2 layers of 32 channels, {words(how, 'digits')}")


def layer_machinery(spec: str) -> Evidence:
    """The smoke tier: forward is the reference, on a line and on a grid, and steps on a batch of digits lower its loss.

    It says nothing about the paper.
    """
    checks = []
    for name, place in {"a text": {"causal": True}, "a picture": {"causal": False, "grid": (6, 6)}}.items():
        with drawn(SEED, "claims"):
            mixer = make_mixer(spec, Slot(16, 4, **place)).double()
        x = torch.randn(2, 36, 16, generator=rng.generator("smoke"), dtype=torch.float64)
        with torch.no_grad():
            wanted, ours = mixer.reference(x), mixer(x)[0]
        far, allowed = float((ours - wanted).abs().max()), torch.finfo(torch.float32).eps * float(wanted.abs().max())
        checks.append(Check(f"{name}: largest difference from the reference", far, far, far, allowed, far <= allowed))
    losses = {name: _fitted(arm) for name, arm in {"full": "full", "ours": spec, "random": RandomKeys()}.items()}
    fell = losses["ours"][0] - losses["ours"][-1]
    checks.append(Check("nats by which the loss of one batch fell", fell, fell, fell, 0.0, fell > 0))
    table = [{"who": name, "nats": every[-1]} for name, every in losses.items()]
    return Evidence(checks, "16 channels, one layer, 8 x 8 digits: the machinery, not the paper", table=table)


def _fitted(spec: Spec) -> list[float]:
    """Loss of one batch before each step on it."""
    task = get("digits")
    net = VisionModel(task.vocabulary, task.image, patch=task.patch, mixer=spec, channels=16, layers=1)
    batch, optimiser, losses = task.batch(0, 8, SEED), torch.optim.AdamW(net.parameters(), lr=1e-3), []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(net(batch.inputs), batch.targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def now(tier: str) -> float:
    """Seconds of this process, whatever else the machine does; of a GPU with all of its work done."""
    if tier == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def share(window: int, cells: int) -> str:
    """Of all pairs, for the setting of a claim."""
    return f"{window} of {cells} keys ({window / cells:.0%})"

