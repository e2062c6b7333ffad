"""MASFormer: one full layer of four makes up for local attention in the others."""

from __future__ import annotations

import tempfile
from dataclasses import replace

from saccade.claims._bench import at_least, at_most, machinery
from saccade.claims._contract import Check, Claim, Evidence, Progress
from saccade.measure.stats import Estimate, paired
from saccade.measure.training import train
from saccade.methods.sparse.masformer import Masformer

CLAIM = Claim(
    says="A decoder with full attention in a few bottom layers and block-local attention elsewhere is competitive with"
    " full attention at up to 75 % less attention cost; with local layers alone it is clearly worse.",
    where="arXiv 2310.12442, abstract and section 4",
    setting="GPT-Neo 1.3B continued on texts of 8,192 tokens, 4 or 8 of 24 layers full, blocks of 1,024",
    how="A byte-level model of 4 layers trained from scratch on Moby-Dick, rows of 256 bytes, 3 seeds, half of the"
    " pairs: one full layer at the bottom, at the top, none, random blocks, and full attention. Same steps, same"
    " initial weights. So small a model of so short rows tests the ordering, not the paper's lengths.",
    counts="One full layer at the bottom costs at most 0.05 bits per byte more than full attention, and both no full"
    " layer and random blocks cost more than it.",
)
ARMS = {
    "bottom": "masformer:full_layers=1",
    "top": "masformer:full_layers=1,placement=top",
    "local": "masformer:full_layers=0",
}
BITS = 0.05


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke" or "cpu"."""
    if tier == "smoke":
        return machinery(replace(Masformer(), full_layers=1))
    sizes = {"tokens": 256, "rows": 8, "layers": 4, "steps": 150, "seeds": 3, "budget": 0.5}
    with tempfile.TemporaryDirectory() as folder:
        found = train("mobydick", ARMS, folder, **sizes, progress=progress or _silent)
    lines = {line["mixer"]: line for line in found["mixers"]}
    scores = {name: line["scores"] for name, line in lines.items()}
    checks = [
        at_most("bits, bottom minus full", _less(scores, "bottom", "full"), BITS),
        _above("bits, local minus bottom", _less(scores, "local", "bottom")),
        _above("bits, random minus bottom", _less(scores, "random", "bottom")),
    ]
    table = [{"who": n, "bits": x["score"]["mean"], "density": x["density"]} for n, x in lines.items()]
    setting = "byte-level, 4 layers of 64 channels, rows of 256, 150 steps of 8 rows, float32; 0.5 of the pairs"
    return Evidence(checks, setting, table=table)


def _less(scores: dict[str, list[float]], one: str, other: str) -> Estimate:
    return paired(scores[one], scores[other], hits=False)


def _above(name: str, found: Estimate) -> Check:
    """Holds if the whole interval lies above 0."""
    return replace(at_least(name, found, 0.0), holds=found.low > 0)


def _silent(done: int, total: int, text: str) -> None:
    """Nobody asked."""
