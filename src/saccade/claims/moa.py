"""MoA: spans of their own for every head find what one window for all heads, of the same mean length, does not."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import torch

from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import SEED, Claim, Evidence
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.measure.stats import Estimate, hit_rate, paired
from saccade.methods.sparse.moa import LIMITS, MoA

CLAIM = Claim(
    says="At the same mean span, half of the text, heads with spans of their own retrieve 1.5 to 7.1 times as well as"
    " heads with one window, and perplexity stays within 5 % of dense attention; plans hold for texts longer than"
    " those that they were found on.",
    where="arXiv 2406.14909, abstract, section 6 (retrieval, perplexity, long-context suites; length generalisation)",
    setting="Vicuna-7B and 13B, Llama-3-8B and 70B; profiled at 2k to 8k tokens, density 0.5, texts to 16k and beyond",
    how="SmolLM2-135M with the shipped plans, half of the keys: pass keys in real prose at 512 and 1,024 tokens against"
    " full, random keys, a uniform window with as many first tokens (streaming), and the same rules dealt to other"
    " heads by chance; loss on 512 tokens of prose after 1,536, twice the longest text of the profile where that was"
    " 1,024. Scaled down in model and length; the profile is of pass keys in another text, not of answered questions.",
    counts="1.5 times the pass keys of the uniform window, 20 points above the dealt rules, within 10 of full;"
    " perplexity within 5 % and no worse than the uniform window's; a share of at least a tenth, and at most nine"
    " tenths, of heads whose span grows with more than half of the text.",
    tiers=("smoke", "cpu", "gpu"),
)
BUDGET = 0.5
SINKS = 32  # first tokens, of ours and of the uniform window


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        spans = {"alpha": torch.tensor([[[16.0], [0.0]], [[0.0], [-8.0]]]), "beta": torch.full((2, 2, 1), 0.25)}
        return machinery(MoA(sink_tokens=4, artefact=Artefact("moa", spans, "tiny", "")))
    keys = Bench("passkey", (512, 1024), 8, progress, tier=tier)
    made = Artefact.find("moa", keys.mark)
    if made is None:
        raise CannotRun("claim moa", "no plan was searched for SmolLM2", "saccade calibrate moa")
    uniform, ours = f"streaming:sink_tokens={SINKS}", MoA(sink_tokens=SINKS, artefact=made)
    found, full, near = keys.scores(ours, BUDGET), keys.scores("full"), keys.scores(uniform, BUDGET)
    dealt = keys.scores(_dealt(made), BUDGET, "moa, the same rules on other heads")
    keys.scores("random:part=evict", BUDGET)
    text = Bench("continuation-loss", (2048,), 2, progress, (keys.model, keys.tokenizer), tier)
    loss, window = text.scores(ours, BUDGET), text.scores(uniform, BUDGET)
    growing = _growing(made)
    checks = [
        at_least("pass keys minus 1.5 times the window's", paired(found, [1.5 * x for x in near], False), 0.0),
        at_least("pass keys, minus the same rules on other heads", keys.difference(found, dealt), 0.20),
        at_least("pass keys, minus full", keys.difference(found, full), -0.10),
        at_most("nats, minus full (5 %)", text.difference(loss, text.scores("full")), math.log(1.05)),
        at_most("nats, minus the uniform window", text.difference(loss, window), 0.0),
        at_least("heads that grow with half of the text or more", growing, 0.1),
        at_most("the same", growing, 0.9),
    ]
    profile = f"profile of {made.data}, to {made.figures['lengths'][-1]} tokens"
    setting = f"{keys.where()}; {keys.what()}; {text.what()}; {BUDGET} kept; {profile}"
    losses = {name: round(value, 3) for name, value in made.figures["held_out_losses"].items()}
    reason = f"Loss on the text held out, of plans by the lengths that they were searched for: {losses}."
    return Evidence(checks, setting, reason, table=keys.rows() + text.rows() + _histogram(made))


def _dealt(made: Artefact) -> MoA:
    """Every head has the rules of another one, of any layer."""
    layers, g, _ = made.tensors["alpha"].shape
    order = torch.randperm(layers * g, generator=rng.generator("claims/moa", SEED))
    dealt = {name: x.flatten(0, 1)[order].unflatten(0, (layers, g)) for name, x in made.tensors.items()}
    return MoA(sink_tokens=SINKS, artefact=dataclasses.replace(made, tensors=dealt))


def _plan(made: Artefact) -> tuple[list[float], list[float]]:
    """alpha and beta of every head at the claim's budget."""
    alpha, beta = (made.tensors[name][..., LIMITS.index(BUDGET)].flatten().tolist() for name in ("alpha", "beta"))
    return alpha, beta


def _growing(made: Artefact) -> Estimate:
    return hit_rate([float(b > 0.5) for b in _plan(made)[1]])


def _histogram(made: Artefact) -> list[dict[str, object]]:
    """The rules of the plan, and how many heads have each."""
    count = Counter(zip(*_plan(made)))
    return [{"alpha": a, "beta": b, "heads": n} for (a, b), n in count.most_common()]
