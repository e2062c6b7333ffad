"""MoBA: routed to a few blocks, a model trains to the loss of full attention."""

from __future__ import annotations

import tempfile

import torch

from saccade.claims._bench import Bench, at_least, machinery
from saccade.claims._contract import Claim, Evidence, Progress
from saccade.claims._seeds import less, scores, silent, surely_above, surely_at_most, trained, training
from saccade.core.artefact import Artefact
from saccade.core.budget import Budget
from saccade.core.method import Method
from saccade.measure.training import train
from saccade.methods.sparse.minference import CANDIDATES, MInference
from saccade.methods.sparse.moba import Moba

CLAIM = Claim(
    says="Trained from the beginning with each query in 3 of 16 blocks, 81 % fewer pairs, models come within 0.001 nats"
    " of full attention; at equal pairs finer blocks are better, by about 0.01 nats.",
    where="arXiv 2502.13189, sections 3.1 and 3.2, figures 3 and 4",
    setting="0.6B to 2.1B models trained on 11B to 37B tokens, rows of 8k and 32k, blocks of 512",
    how="A byte-level model of 2 layers trained from scratch on Moby-Dick, rows of 256 bytes, 5 seeds, a quarter of the"
    " pairs: 3 blocks, 8 finer ones, the own block alone (as large as the 3), sinks with a window (streaming), random"
    " blocks, and full attention. Same steps, same initial weights. So small a model of so short rows tests the"
    " ordering, not the paper's lengths. And attached without training, which the authors say it is not made for:"
    " SmolLM2-135M at a quarter of the pairs, loss on the last 512 of 2,048 tokens of prose.",
    counts="3 blocks cost at most 0.05 bits per byte more than full attention, 8 no more than 3, and the own block"
    " alone, random blocks and streaming cost more; attached without training, better than random blocks by 0.02 nats.",
    tiers=("smoke", "cpu", "gpu"),
)
BUDGET, LAYERS, HEADS, BITS = 0.25, 2, 4, 0.05


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(Moba())
    sizes, how = {"tokens": 256, "layers": LAYERS, "heads": HEADS, "budget": BUDGET}, training(tier, 4, 100)
    with tempfile.TemporaryDirectory() as folder:
        found = train("mobydick", _arms(), folder, **sizes, **how, progress=progress or silent)
    bits = scores(found)
    text = Bench("loss", (2048,), 2, progress, tier=tier)
    ours, chance = text.scores("moba", BUDGET), text.scores("random:part=prefill", BUDGET)
    near = text.scores("streaming", f"{Budget(BUDGET).row_tokens(*text.lengths)}tok")
    checks = [
        surely_at_most("bits, 3 blocks minus full", less(bits["moba"], bits["full"]), BITS),
        surely_at_most("bits, 8 blocks minus 3", less(bits["finer"], bits["moba"]), 0.0),
        surely_above("bits, own block alone minus 3", less(bits["own block"], bits["moba"])),
        surely_above("bits, random blocks minus 3", less(bits["random"], bits["moba"])),
        surely_above("bits, streaming minus 3", less(bits["streaming"], bits["moba"])),
        at_least("nats untrained, random blocks minus ours", text.difference(chance, ours), 0.02),
    ]
    table = [{"who": x["mixer"], "bits": x["score"]["mean"], "density": x["density"]} for x in found["mixers"]]
    lost, theirs = (text.difference(x, text.scores("full")).mean for x in (ours, near))
    reason = f"Attached without training it loses {lost:+.3f} nats over full, streaming {theirs:+.3f}."
    setting = f"byte-level, {LAYERS} layers, {trained(how, 'rows of 256')}; {text.where()}, {text.what()}"
    setting += f"; {BUDGET} of the pairs"
    return Evidence(checks, setting, reason, table=table + text.rows())


def _arms() -> dict[str, str | Method]:
    """What is trained beside full attention and random blocks, all at the same budget."""
    spans = next(i for i, candidate in enumerate(CANDIDATES) if candidate.shape == "spans")
    figures = {"candidates": [list(candidate) for candidate in CANDIDATES]}
    ends = Artefact("minference", {"pattern": torch.full((LAYERS, HEADS), spans)}, "", "", figures=figures)
    return {
        "moba": "moba",
        "finer": "moba:top_blocks=8",
        "own block": "moba:top_blocks=1",
        "streaming": MInference(artefact=ends),
    }
