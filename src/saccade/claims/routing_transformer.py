"""Routing Transformer: clusters reach what a window does not, at a fraction of the pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from saccade.claims._contract import Claim, Evidence, Progress
from saccade.claims._planted import Planted, Scores, Study, machinery, rows
from saccade.claims._seeds import less, surely_at_least, surely_at_most, training
from saccade.measure.stats import mean_interval
from saccade.methods.nets import LanguageModel

CLAIM = Claim(
    says="Half of the heads routed by learnt centroids finds far tokens by their content, where local heads alone do"
    " not, and models language about as well as full attention.",
    where="arXiv 2003.05997, section 5: WikiText-103 perplexity 15.8, 18.3 of a dense baseline",
    setting="14 layers of 1,024 channels, 4,096 tokens, 8 local and 8 routing heads, 8 clusters of 512",
    how="Nets of 2 layers and 32 channels, trained on 64 bytes of Moby-Dick each, in which one of four needles is"
    " planted and asked for in the last 4 places; 8 clusters of 8 tokens, windows of 8, 5 seeds: clusters as in the"
    " paper, strictly causal ones, local heads alone, random blocks of as many pairs, and full attention. Scaled down"
    " very far.",
    counts="Both kinds of clusters find 30 points more needles than local heads alone; those of the paper are within 10"
    " points of full attention, within 3 % of its perplexity, and no worse than random blocks.",
    tiers=("smoke", "cpu", "gpu"),
)
TOKENS, CLUSTERS = 64, 8
OURS = f"routing-transformer:clusters={CLUSTERS}"


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery("routing-transformer")
    study = Study(TOKENS, **training(tier, 8, 120), progress=progress)
    tests = study.tests(TOKENS)
    arms = {"full": "full", "routing": OURS, "strict": f"{OURS},strict_causal=true", "local": f"{OURS},local_heads=4"}
    nets = {who: study.trained(mixer) for who, mixer in arms.items()}
    found = {who: Scores.of(some, tests) for who, some in nets.items()}
    found["random"] = Scores.of(study.trained("random:block_tokens=4", found["routing"].pairs), tests)
    reason = _reason(*zip(*[_meetings(net, tests) for net in nets["strict"]]))
    hits, nats = ({who: getattr(x, what) for who, x in found.items()} for what in ("hits", "nats"))
    checks = [
        surely_at_least("needles, routing minus local", less(hits["routing"], hits["local"]), 0.30),
        surely_at_least("needles, strictly causal minus local", less(hits["strict"], hits["local"]), 0.30),
        surely_at_least("needles, routing minus full", less(hits["routing"], hits["full"]), -0.10),
        surely_at_most("nats per byte, routing minus full (3 %)", less(nats["routing"], nats["full"]), math.log(1.03)),
        surely_at_least("needles, routing minus random", less(hits["routing"], hits["random"]), 0.0),
    ]
    return Evidence(checks, study.setting(f"texts of {TOKENS} bytes"), reason, table=rows(found))


@torch.no_grad()
def _meetings(net: LanguageModel, texts: Planted) -> tuple[float, float]:
    """In how many texts the last token has the nearest cluster of a needle in some head of the last layer, and in how
    many the needle is among what it then sees."""
    layer, given = net.blocks[-1].mixer, []
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    net(texts.ids)
    hook.remove()
    points = layer._heads(given[0], None)[1][:, layer.local :]
    own = (points @ layer.centroids().mT).argmax(-1)
    alike = own == own[..., -1:]
    newest = alike & (alike.flip(-1).cumsum(-1).flip(-1) <= TOKENS // CLUSTERS)
    needle = (texts.ids == texts.needle[:, None])[:, None]
    alike, newest = (float((x & needle).any(-1).any(-1).double().mean()) for x in (alike, newest))
    return alike, newest


def _reason(alike: Sequence[float], newest: Sequence[float]) -> str:
    where, seen = (mean_interval(x).mean for x in (alike, newest))
    return (
        f"Strictly causal, at the end of training, the last token has the nearest cluster of the needle in {where:.0%}"
        f" of the texts, and sees the needle, among the newest {TOKENS // CLUSTERS} tokens of it, in {seen:.0%}: what"
        " is seen and not named was routed rightly and is not read yet."
    )
