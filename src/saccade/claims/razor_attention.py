"""RazorAttention: heads that find repeated random tokens are those that a later question needs."""

from __future__ import annotations

import dataclasses

import torch

from saccade import tasks
from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import SEED, Claim, Evidence
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.measure.stats import mean_interval, paired
from saccade.methods.cache.razor_attention import RazorAttention

CLAIM = Claim(
    says="With 15 % of the heads kept whole, over 70 % of the cache saved, answers stay as they were; as many random"
    " heads are worse, and so it is without echo heads (about 10 % of needles) or without the compensation token (over"
    " 30 %).",
    where="arXiv 2407.15891, abstract, section 3; LongBench, needle in a haystack and the ablations of its experiments",
    setting="Qwen1.5-7B and 72B, Llama-2-13B, Llama-3, Baichuan; windows of a fifth of the text, at least 4,000 tokens",
    how="SmolLM2-135M with the shipped scores, 13 induction heads and 1 echo head of 90, three tenths of the cache:"
    " pass keys in real prose at 512 and 1,024 tokens, against full, random keys, three draws of random heads, no whole"
    " heads, no echo head and no compensation token, all in a cache of the same size; loss of 512 tokens after 1,536;"
    " overlap of the chosen heads over random texts of 250, 500 and 1,000 tokens. Scaled down in model and length.",
    tiers=("smoke", "cpu", "gpu"),
    counts="Pass keys within 10 points of full and 30 above random heads, 5 above the cache without echo head and 5"
    " above that without compensation token; loss within 1 % perplexity; four fifths of the chosen heads the same.",
)
BUDGET = 0.3
DRAWS = 3  # of random heads
PERIODS = (250, 500, 500, 1000)  # random tokens of the texts that the choice must not depend on
TWICE, ROOM = "razor-attention:induction_share=0.28,echo_share=0.02", 0.42  # twice the heads, windows as wide as before


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        some = {"induction": torch.tensor([[0.9, 0.1], [0.2, 0.8]]), "echo": torch.tensor([[0.0, 0.1], [0.3, 0.2]])}
        made = Artefact("razor-attention", some, "tiny", "")
        return machinery(RazorAttention(sink_tokens=2, window_tokens=4, artefact=made))
    keys = Bench("passkey", (512, 1024), 10, progress, tier=tier)
    ranked = Artefact.find("razor-attention", keys.mark)
    if ranked is None:
        do = "saccade calibrate razor-attention"
        raise CannotRun("claim razor-attention", "no heads were ranked for SmolLM2", do)
    ours, full = keys.scores("razor-attention", BUDGET), keys.scores("full")
    draws = [keys.scores(_by_chance(ranked, d), BUDGET, f"razor-attention, random heads, draw {d}") for d in _draws()]
    chance = [sum(some) / DRAWS for some in zip(*draws)]
    without = {
        "echo": keys.scores("razor-attention:echo_share=0", BUDGET),
        "compensation": keys.scores("razor-attention:compensation=none", BUDGET),
    }
    keys.scores("razor-attention:induction_share=0,echo_share=0", BUDGET)
    keys.scores("random:part=evict", BUDGET)
    text = Bench("continuation-loss", (2048,), 3, progress, (keys.model, keys.tokenizer), tier)
    loss = text.difference(text.scores("razor-attention", BUDGET), text.scores("full"))
    bare = text.difference(text.scores("razor-attention:compensation=none", BUDGET), text.scores("full"))
    text.scores("random:part=evict", BUDGET)
    same = mean_interval(_overlaps(keys, ranked))
    checks = [
        at_least("razor-attention minus full, pass keys", keys.difference(ours, full), -0.10),
        at_least("its heads minus random heads, pass keys", paired(ours, chance, False), 0.30),
        at_least("with echo head minus without, pass keys", keys.difference(ours, without["echo"]), 0.05),
        at_least("with compensation minus without, pass keys", keys.difference(ours, without["compensation"]), 0.05),
        at_most("razor-attention minus full, nats (1 % perplexity)", loss, 0.01),
        at_least("chosen heads shared over texts and lengths", same, 0.8),
    ]
    setting = (
        f"{keys.where()}; {keys.what()}, {text.what()}, 512 of them scored; {BUDGET} of the cache; heads ranked on"
        f" random tokens of {ranked.data}; at every tier overlap over texts of {min(PERIODS)} to {max(PERIODS):,}"
        " random tokens"
    )
    reason = f"Without the compensation token the loss is {bare.mean:+.3f} nats from full, with it {loss.mean:+.3f}."
    if not (checks[0].holds and loss.mean <= 0.01):
        found, lost = keys.difference(keys.scores(TWICE, ROOM), full).mean, text.scores(TWICE, ROOM)
        lost = text.difference(lost, text.scores("full")).mean
        reason += f" With twice as many whole heads, at {ROOM} of the cache, {found:+.2f} keys and {lost:+.3f} nats."
    return Evidence(checks, setting, reason, table=keys.rows() + text.rows() + _layers(ranked))


def _draws() -> range:
    return range(1, DRAWS + 1)


def _by_chance(ranked: Artefact, draw: int) -> RazorAttention:
    """As many heads, drawn blindly."""
    shape = ranked.tensors["induction"].shape
    drawn = {n: torch.rand(shape, generator=rng.generator(f"claims/razor/{n}", SEED, draw)) for n in ranked.tensors}
    return RazorAttention(artefact=dataclasses.replace(ranked, tensors=drawn))


def _chosen(artefact: Artefact) -> set[int]:
    """The heads that would be whole, numbered through the model."""
    return set((RazorAttention(artefact=artefact).need().flatten() < 1).nonzero()[:, 0].tolist())


def _overlaps(keys: Bench, ranked: Artefact) -> list[float]:
    """Of the shipped choice, the share that rankings on one other random text each choose too."""
    subject, out = Subject(keys.model), []
    for index, period in enumerate(PERIODS):
        row = torch.tensor([tasks.passage(keys.tokenizer, 2048, index, SEED + 1)[0]])
        found = RazorAttention(probe_tokens=period).calibrate(subject, [row])
        out.append(len(_chosen(found) & _chosen(ranked)) / len(_chosen(ranked)))
    return out


def _layers(ranked: Artefact) -> list[dict[str, object]]:
    """Where in the model the whole heads are."""
    layers, g = ranked.tensors["induction"].shape
    where = [head // g for head in _chosen(ranked)]
    thirds = [(i * layers // 3, (i + 1) * layers // 3) for i in range(3)]
    return [{"layers from": a, "to": b, "whole heads": sum(a <= x < b for x in where)} for a, b in thirds]
