"""Retrieval heads: few, the same everywhere, and what answers depend on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from saccade import models, tasks
from saccade.attach import attach, fingerprint
from saccade.attach.ablation import Mode, without_heads
from saccade.attach.calibration import Subject
from saccade.attach.compat import CACHE
from saccade.claims._bench import TIERS, Progress, at_least, at_most
from saccade.claims._contract import SEED, Check, Claim, Evidence
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.measure.stats import NORMAL, hit_rate, mean_interval, paired
from saccade.methods.probes.retrieval_head import RetrievalHead, Trial

CLAIM = Claim(
    says="In every model fewer than 5 % of the heads fetch facts from a long text. They are the same whatever the text,"
    " and in models trained further from it. Without the best 5 % of heads every model fails the needle test, without"
    " as many random ones it hardly changes.",
    where="arXiv 2404.15574, sections 2, 3 and 4.1: figures of score levels, of correlations within families, and of"
    " needles under masking",
    setting="Llama-2-7B-80K and 13B-64K, Yi-6B and 34B-200K, Qwen1.5-14B, Mistral-7B-v0.2, Mixtral-8x7B; 600 runs of"
    " 1,000 to 50,000 tokens; 10 to 100 of 1,024 heads masked while decoding",
    how="SmolLM2-135M-Instruct, 270 heads. Scores of 40 needle runs in 512 tokens of real prose, by the halves of the"
    " texts and by the kind of needle (sentences, words): one model instead of relatives. The best 3 to 27 heads of the"
    " shipped scores, which saw no pass key, taken out while 20 pass keys in 1,024 tokens are answered, and three draws"
    " of as many of the other heads; loss of 512 tokens after 512 of prose under such masks. Scaled down in model,"
    " length and runs.",
    tiers=("smoke", "cpu", "gpu"),
    counts="At most 10 % of the heads score 0.1 or more; rank correlation of the halves 0.7, correlation of the kinds"
    " 0.8; without the best 5 % of heads 40 points fewer pass keys, without random ones at most 10, and perplexity"
    " within 5 %.",
)
MASKED = (3, 5, 8, 14, 27)  # heads; 14 are 5 % of 270
SHARE = 14
DRAWS = 3  # of random heads
TEXTS, TOKENS = 8, 512  # of the needle runs
KEYS, PROSE = 20, 4
Heads = list[tuple[int, int]]
Scores = dict[str, list[float]]  # mask -> score of every sample


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu", which has more texts of the same lengths."""
    if tier == "smoke":
        return _machinery()
    here = TIERS[tier]
    model, tokenizer = here.load()
    scored = Artefact.find("retrieval-head", fingerprint(model))
    if scored is None:
        raise CannotRun("claim retrieval-head", "no heads of SmolLM2 were scored", "saccade calibrate retrieval-head")
    probe = RetrievalHead(artefact=scored)
    rows = [torch.tensor([tasks.passage(tokenizer, TOKENS, i, SEED + 1)[0]]) for i in range(TEXTS * here.more)]
    trials = list(probe.trials(Subject(model), rows, progress))
    right = [t for t in trials if t.recall >= probe.least_recall]
    masks = dict(_masks(probe))
    asked = tasks.get("passkey").samples(tokenizer, 1024, KEYS * here.more, SEED)
    keys = _score(model, "passkey", asked, masks, progress)
    some = {name: mask for name, mask in masks.items() if len(mask[0]) in (0, SHARE) and mask[1] == "uniform"}
    prose = tasks.get("continuation-loss").samples(tokenizer, 1024, PROSE * here.more, SEED)
    text = _score(model, "continuation-loss", prose, some, progress)
    setting = (
        f"{here.where()}; {len(right)} of {len(trials)} needle runs in {TOKENS} tokens answered right;"
        f" {len(asked)} pass keys in 1,024 tokens, loss in {len(prose)} texts of 1,024; heads masked by"
        f" scores of {scored.data}"
    )
    return Evidence(_checks(probe, trials, right, keys, text), setting, _reason(keys, text), _table(keys, text, trials))


def _checks(probe: RetrievalHead, trials: list[Trial], right: list[Trial], keys: Scores, text: Scores) -> list[Check]:
    mean = torch.stack([t.score for t in right]).mean(0)
    halves = [_mean(t for i, t in enumerate(trials) if t in right and i // probe.depths % 2 == h) for h in (0, 1)]
    kinds = [_mean(t for t in right if t.kind == kind) for kind in ("sentence", "words")]
    without, chance = keys[f"best {SHARE}"], keys["random"]
    lost = paired(text[f"best {SHARE}"], text["full"], False)
    return [
        at_most("heads that score 0.1 or more", hit_rate((mean >= probe.least_score).flatten().tolist()), 0.10),
        _related("rank correlation of the halves of the texts", [_ranks(x) for x in halves], 0.7),
        _related("correlation of sentences with words", kinds, 0.8),
        at_least(f"full minus without the best {SHARE}, pass keys", paired(keys["full"], without, True), 0.40),
        at_most(f"full minus without {SHARE} random heads, pass keys", paired(keys["full"], chance, False), 0.10),
        at_most(f"without the best {SHARE} minus full, nats (5 % perplexity)", lost, math.log(1.05)),
    ]


# --- what heads are taken out -----------------------------------------------------------------------------------------


def _masks(probe: RetrievalHead) -> Iterator[tuple[str, tuple[Heads, Mode]]]:
    assert probe.artefact is not None
    every = probe.best(probe.artefact.tensors["score"].numel())
    yield "full", ([], "uniform")
    for count in MASKED:
        yield f"best {count}", (every[:count], "uniform")
    yield f"best {SHARE}, zero", (every[:SHARE], "zero")
    others = every[max(MASKED) :]
    for count in (SHARE, max(MASKED)):
        for draw in range(1, DRAWS + 1):
            order = torch.randperm(len(others), generator=rng.generator("claims/retrieval-head", SEED, draw)).tolist()
            yield f"random {count}, draw {draw}", ([others[i] for i in order[:count]], "uniform")


@torch.no_grad()
def _score(
    model: Any, name: str, samples: Sequence[Any], masks: dict[str, tuple[Heads, Mode]], progress: Progress | None
) -> Scores:
    """Under each mask: the prompt is read once with all heads, but for its last token, with which decoding begins."""
    task, out = tasks.get(name), {mask: [] for mask in masks}
    for done, sample in enumerate(samples, 1):
        ids = torch.cat([sample.context, sample.continuation], 1).to(model.device)
        start = sample.context.shape[1] - 1
        cache = model(ids[:, :start], use_cache=True, logits_to_keep=1)[CACHE]
        for mask, (heads, mode) in masks.items():
            with without_heads(model, heads, mode):
                logits = model(ids[:, start:-1], **{CACHE: cache}, use_cache=True).logits[0]
            cache.crop(start - cache.get_seq_length())
            out[mask].append(task.score(logits, sample))
        if progress is not None:
            progress(done, len(samples), f"{task.name} without heads")
    for count, said in ((SHARE, "random"), (max(MASKED), f"random {max(MASKED)}")):
        draws = [out[f"random {count}, draw {d}"] for d in range(1, DRAWS + 1) if f"random {count}, draw {d}" in out]
        if draws:
            out[said] = [sum(some) / DRAWS for some in zip(*draws)]
    return out


# --- how alike scores are ---------------------------------------------------------------------------------------------


def _mean(trials: Iterator[Trial]) -> Tensor:
    return torch.stack([t.score for t in trials]).mean(0).flatten().double()


def _ranks(x: Tensor) -> Tensor:
    """Ranks, those of equal numbers averaged."""
    return (x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2


def _related(name: str, pair: Sequence[Tensor], bar: float) -> Check:
    """Pearson's correlation with Fisher's interval, over the heads."""
    r, n = float(torch.corrcoef(torch.stack(list(pair)))[0, 1]), len(pair[0])
    wide = NORMAL.inv_cdf(0.975) / math.sqrt(n - 3)
    low, high = (math.tanh(math.atanh(min(r, 1 - 1e-12)) + side) for side in (-wide, wide))
    return Check(name, r, low, high, bar, r >= bar, n)


# --- what is said of it -----------------------------------------------------------------------------------------------


def _reason(keys: Scores, text: Scores) -> str:
    def share(who: str) -> str:
        return f"{sum(keys[who]) / len(keys[who]):.0%}"

    lost = {n: sum(a - b for a, b in zip(x, text["full"])) / len(x) for n, x in text.items()}
    steps = ", ".join(f"{share(f'best {count}')} without {count}" for count in MASKED)
    return (
        f"Of the pass keys {share('full')} are found with all heads, {steps}; {share('random')} without {SHARE} random"
        f" ones, {share(f'random {max(MASKED)}')} without {max(MASKED)}; {share(f'best {SHARE}, zero')} if the best"
        f" {SHARE} give nothing at all. The loss then rises by {lost[f'best {SHARE}']:.3f} nats without the best"
        f" {SHARE}, by {lost['random']:.3f} without random ones."
    )


def _table(keys: Scores, text: Scores, trials: list[Trial]) -> list[dict[str, Any]]:
    rows = []
    for task, scores in (("passkey", keys), ("continuation-loss", text)):
        for who, values in scores.items():
            e = mean_interval(values)
            rows.append({"task": task, "who": who, "n": e.n, "mean": e.mean, "low": e.low, "high": e.high})
    for t in trials:
        rows.append({"needle": t.kind, "depth": t.depth, "recall": t.recall, "best score": float(t.score.max())})
    return rows


@torch.no_grad()
def _machinery() -> Evidence:
    """The smoke tier: looking on changes no bit, nor does taking out no head; taking out every head does."""
    model = models.tiny("llama").double()
    ids = torch.randint(3, models.families.VOCAB, (1, 96), generator=rng.generator("smoke"))
    plain = model(ids).logits
    with attach(model, RetrievalHead()):
        watched = float((model(ids).logits - plain).abs().max())
    changed = {}
    for name, heads in {"none": [], "random": [(1, 2)], "all": [(i, j) for i in range(2) for j in range(4)]}.items():
        with without_heads(model, heads):
            changed[name] = float((model(ids).logits - plain).abs().max())
    rounding = float((model.float()(ids).logits.double() - plain).abs().max())
    checks = [
        Check("under the probe: largest difference", watched, watched, watched, 0.0, watched == 0),
        Check("without no head: largest difference", changed["none"], 0.0, 0.0, 0.0, changed["none"] == 0),
        Check("without all heads: largest difference", changed["all"], 0.0, 0.0, rounding, changed["all"] > rounding),
    ]
    table = [{"who": "full", "difference": 0.0}, {"who": "random", "difference": changed["random"]}]
    return Evidence(checks, "tiny random Llama, 96 tokens: the machinery, not the paper", table=table)
