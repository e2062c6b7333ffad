"""MASFormer: one full layer of four makes up for local attention in the others."""

from __future__ import annotations

import tempfile
from dataclasses import replace

from saccade.claims._bench import machinery
from saccade.claims._contract import Claim, Evidence, Progress
from saccade.claims._seeds import less, scores, silent, surely_above, surely_at_most, trained, training
from saccade.measure.training import train
from saccade.methods.sparse.masformer import Masformer

CLAIM = Claim(
    says="A decoder with full attention in a few bottom layers and block-local attention elsewhere is competitive with"
    " full attention at up to 75 % less attention cost; with local layers alone it is clearly worse.",
    where="arXiv 2310.12442, abstract and section 4",
    setting="GPT-Neo 1.3B continued on texts of 8,192 tokens, 4 or 8 of 24 layers full, blocks of 1,024",
    how="A byte-level model of 4 layers trained from scratch on Moby-Dick, rows of 256 bytes, 5 seeds, half of the"
    " pairs: one full layer at the bottom, on a GPU also at the top, none, random blocks, and full attention. Same"
    " steps, same initial weights. So small a model of so short rows tests the ordering, not the paper's lengths.",
    counts="One full layer at the bottom costs at most 0.05 bits per byte more than full attention, and both no full"
    " layer and random blocks cost more than it.",
    tiers=("smoke", "cpu", "gpu"),
)
ARMS = {
    "bottom": "masformer:full_layers=1",
    "top": "masformer:full_layers=1,placement=top",
    "local": "masformer:full_layers=0",
}
BITS = 0.05


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(replace(Masformer(), full_layers=1))
    how, arms = training(tier, 2, 120), {name: arm for name, arm in ARMS.items() if name != "top" or tier == "gpu"}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"tokens": 256, "layers": 4, "budget": 0.5}
        found = train("mobydick", arms, folder, **sizes, **how, progress=progress or silent)
    bits = scores(found)
    checks = [
        surely_at_most("bits, bottom minus full", less(bits["bottom"], bits["full"]), BITS),
        surely_above("bits, local minus bottom", less(bits["local"], bits["bottom"])),
        surely_above("bits, random minus bottom", less(bits["random"], bits["bottom"])),
    ]
    table = [{"who": x["mixer"], "bits": x["score"]["mean"], "density": x["density"]} for x in found["mixers"]]
    setting = f"byte-level, 4 layers of 64 channels, {trained(how, 'rows of 256')}; 0.5 of the pairs"
    return Evidence(checks, setting, table=table)
