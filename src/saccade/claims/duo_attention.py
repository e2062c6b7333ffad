"""DuoAttention: trained gates find the heads that retrieve."""

from __future__ import annotations

import dataclasses

import torch

from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import SEED, Claim, Evidence
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.measure.stats import mean_interval, paired
from saccade.methods.cache.duo_attention import DuoAttention

CLAIM = Claim(
    says="With half of the heads of a grouped-query model kept full, the needle is found as with all of them, and"
    " gates trained on recall choose the heads better than chance; gates end near 0 or 1.",
    where="arXiv 2410.10819, section 3.2, figures 1, 6 and 11",
    setting="Llama-3-8B-Instruct-Gradient-1048k, up to 1M tokens, sink 64, recent 256; gates trained 2,000 steps on 8"
    " GPUs",
    how="SmolLM2-135M with the shipped gates, sink 16, recent 64: pass keys in real prose at 512 and 1,024 tokens"
    " with half of the heads full: the gates' heads, two draws of random heads, the opposite heads, none; and the"
    " loss of 512 tokens after a context of 512. Scaled down in model, length and training.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Gates within 5 points of full attention, random heads at least 30 points lower than full, gates above"
    " random heads, loss within 2 % perplexity, and 70 % of the gates outside [0.2, 0.8].",
)
PAPERS_RECENT = 256


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        gates = Artefact("duo-attention", {"gates": torch.tensor([[1.0, 0.0], [0.2, 0.8]])}, "tiny", "")
        return machinery(DuoAttention(sink_tokens=2, recent_tokens=6, artefact=gates))
    keys = Bench("passkey", (512, 1024), 10, progress, tier=tier)
    trained = Artefact.find("duo-attention", keys.mark)
    if trained is None:
        raise CannotRun("claim duo-attention", "no gates were trained for SmolLM2", "saccade calibrate duo-attention")
    gates = trained.tensors["gates"].float()
    full, half, wider = keys.scores("full"), _half(keys, 16 + 64), _half(keys, 16 + PAPERS_RECENT)
    by_gates = keys.scores(_with(trained, gates), half)
    by_chance = [sum(pair) / 2 for pair in zip(*(_by_chance(keys, trained, draw, half) for draw in (1, 2)))]
    keys.scores(_with(trained, 1 - gates), half, "duo-attention, opposite heads")
    keys.scores("random:part=evict", half)
    keys.scores("streaming:sink_tokens=16", "80tok")
    text = Bench("continuation-loss", (1024,), 3, progress, (keys.model, keys.tokenizer), tier)
    loss = text.difference(text.scores(_with(trained, gates), half), text.scores("full"))
    text.scores("random:part=evict", half)
    wide = dataclasses.replace(_with(trained, gates), recent_tokens=PAPERS_RECENT)
    window = text.difference(text.scores(wide, wider), text.scores("full")).mean
    decided = mean_interval(((gates < 0.2) | (gates > 0.8)).float().flatten().tolist())
    checks = [
        at_least("gates' heads minus full, pass keys", keys.difference(by_gates, full), -0.05),
        at_most("random heads minus full, pass keys", paired(by_chance, full, False), -0.30),
        at_least("gates' heads minus random heads, pass keys", paired(by_gates, by_chance, False), 0.05),
        at_most("half of the heads minus full, nats (2 % perplexity)", loss, 0.02),
        at_least("share of gates outside [0.2, 0.8]", decided, 0.7),
    ]
    setting = (
        f"{keys.where()}; {keys.what()}; {text.what()}; budget {half:.3f}; gates trained on {trained.data},"
        f" {trained.options['train_steps']} steps"
    )
    reason = (
        f"With {PAPERS_RECENT} recent tokens in the streaming heads, as the paper deploys, half of the heads lose"
        f" {window:+.3f} nats: " + ("64 are few for prose." if window <= 0.02 else "prose needs more of these heads.")
    )
    return Evidence(checks, setting, reason, table=keys.rows() + text.rows() + _gates(gates))


def _half(keys: Bench, held: int) -> float:
    """Half of the heads full in the shortest text, where the others hold so many keys; a little more in longer ones."""
    return 0.5 + 0.5 * held / min(keys.lengths)


def _by_chance(keys: Bench, trained: Artefact, draw: int, half: float) -> list[float]:
    gates = torch.rand(trained.tensors["gates"].shape, generator=rng.generator("claims/duo-attention", SEED, draw))
    return keys.scores(_with(trained, gates), half, f"duo-attention, random heads, draw {draw}")


def _with(artefact: Artefact, gates: torch.Tensor) -> DuoAttention:
    return DuoAttention(artefact=dataclasses.replace(artefact, tensors={"gates": gates}))


def _gates(gates: torch.Tensor) -> list[dict[str, object]]:
    count = torch.histc(gates, 5, 0, 1).int().tolist()
    return [{"gates from": i / 5, "to": (i + 1) / 5, "heads": n} for i, n in enumerate(count)]
