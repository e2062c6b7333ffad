"""TidalDecode: the positions that one layer chooses serve the layers behind it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.measure.stats import paired
from saccade.methods.decode.tidaldecode import TidalDecode

CLAIM = Claim(
    says="The tokens that matter are much the same in consecutive layers: chosen exactly in two layers and read in all"
    " others, they retrieve needles as full attention does, and a second choice in the middle raises the recall of the"
    " layers behind it (at 100k tokens from below 20 % to about 40 %).",
    where="arXiv 2410.05076, table of needles, figure of the recall with one and with two selection layers",
    setting="Llama-3-8B-Gradient-1048k, 10k and 100k tokens, 32 to 512 keys in each layer that reuses; layers 0 and 1"
    " dense, s = 2, c = 13 (7 for Llama-2-7B); one A100",
    how="SmolLM2-135M, 30 layers, s = 2, c from the shipped artefact. Recall of the best sixteenth of the keys in the"
    " layers behind c, by the list of c against that of s, in two texts of 1,536 tokens; ten pass keys in 1,024"
    " tokens, question and answer read with a sixteenth of the keys; loss of 512 tokens after a context of 1,536 with"
    " an eighth of the keys. Full, random keys, sinks and window, and an exact choice in every layer (double-sparsity"
    " with all channels) at the same budget, which counts the four layers that read everything. Shorter and smaller"
    " than the paper: scaled down; its speed is not measured.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Recall 5 points higher with c; pass keys within 5 points of full and 5 above sinks and window; perplexity"
    " within 3 %.",
)
# layers 0, 1, s and c read everything, and that is part of the budget; the other 26 of 30 an eighth or a sixteenth
EIGHTH, SIXTEENTH = (4 + 26 / 8) / 30, (4 + 26 / 16) / 30
BAR = 0.03  # nats
OURS, EXACT = "tidaldecode", "double-sparsity:channels=64"
BASELINES = ("random:part=decode", "streaming")


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(TidalDecode(dense_layers=0, reselect_layer="none"), 0.75)
    text = Bench("continuation-loss", (2048,), 3, progress, tier=tier)
    made = Artefact.find("tidaldecode", text.mark)
    if made is None:
        do = "saccade calibrate tidaldecode"
        raise CannotRun("claim tidaldecode", "no layer that chooses anew was found for SmolLM2", do)
    first, again = TidalDecode(artefact=made).choosing
    keys = Bench("passkey-agnostic", (1024,), 10, progress, (text.model, text.tokenizer), tier)
    contexts = [s.context for s in text.samples[:2]]
    recall = _recalls(Subject(text.model), contexts, first, again)
    losses = {
        who: text.difference(text.scores(who, EIGHTH), text.scores("full"))
        for who in (OURS, EXACT, f"{OURS}:reselect_layer=none", f"{OURS}:reselect_layer=7", *BASELINES)
    }
    hits = {who: keys.scores(who, SIXTEENTH) for who in (OURS, EXACT, *BASELINES)}
    hits["full"] = keys.scores("full")
    checks = [
        at_least("recall behind c, by its list minus that of s", paired(recall["c"], recall["s"], False), 0.05),
        at_least("a sixteenth of the keys, pass keys, minus full", keys.difference(hits[OURS], hits["full"]), -0.05),
        at_least("and minus sinks and window", keys.difference(hits[OURS], hits["streaming"]), 0.05),
        at_most("an eighth of the keys minus full, nats (3 %)", losses[OURS], BAR),
    ]
    setting = (
        f"{text.where()}; s = {first}, c = {again}; recall in two texts of {contexts[0].shape[1]:,} tokens,"
        f" {keys.what()}, {text.what()}, 512 of them scored; recalls that chose c from {made.data}"
    )
    behind = [{"list of layer": who, "recall": sum(v) / len(v), "n": len(v)} for who, v in recall.items()]
    return Evidence(checks, setting, _reason(losses), table=text.rows() + keys.rows() + behind)


def _recalls(subject: Subject, texts: list[Tensor], first: int, again: int) -> dict[str, list[float]]:
    """Per text and layer behind c: the share of its best keys that each list holds, mean over heads."""
    out: dict[str, list[float]] = {"s": [], "c": []}
    for text in texts:
        recall = TidalDecode().calibrate(subject, [text]).tensors["recall"].mean(1)
        out["s"] += recall[first, again + 1 :].tolist()
        out["c"] += recall[again, again + 1 :].tolist()
    return out


def _reason(losses: dict[str, Any]) -> str:
    """What an exact choice in every layer loses, and other c."""
    lost = {who: f"{loss.mean:+.3f}" for who, loss in losses.items()}
    enough = losses[EXACT].mean <= BAR
    blame = "the keys are there, and lists of other layers miss some" if enough else "so few are not enough here"
    none, seventh = (lost[f"{OURS}:reselect_layer={again}"] for again in ("none", 7))
    return (
        f"An exact choice in every layer, as many keys in all, loses {lost[EXACT]} nats: {blame}. Without c the loss is"
        f" {none}, with c = 7, the one of Llama-2, {seventh}."
    )
