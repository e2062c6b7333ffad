"""What claims on layers trained here share: prose with a needle in it, small nets that learn to find it, and scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saccade import tasks
from saccade.claims._contract import SEED, Check, Evidence, Progress
from saccade.claims._seeds import trained
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.method import Slot
from saccade.measure.stats import mean_interval
from saccade.methods.nets import LanguageModel, Spec, make_mixer
from saccade.tasks.training.needle import ASKED, QUESTION, RUN, hidden

VOCABULARY = 128  # bytes up to here; those above are counted as the last
MARK = 2  # a control character, which no text has
RATE, WARM = 1e-2, 20
TESTS, AT_ONCE = 64, 16  # texts to test
WINDOW = "streaming:sink_tokens=0"
Layout = Callable[[Tensor], Tensor]  # what is put between the bytes of a text


@dataclass(frozen=True)
class Planted:
    """Bytes with a needle, a run of one sign, anywhere before the question, which fills the last places.

    prose: places whose byte is to be predicted by the one before; run, asked: length of the needle and the question
    """

    ids: Int[Tensor, "b n"]
    needle: Int[Tensor, " b"]
    prose: Bool[Tensor, " n"]

    @classmethod
    def draw(
        cls, source: Int[Tensor, " m"], tokens: int, rows: int, draw: torch.Generator, layout: Layout = torch.clone,
        run: int = RUN, asked: int = ASKED,
    ) -> Planted:  # fmt: skip
        """From random places of a text; `tokens` before the layout."""
        ids, needle = hidden(source, tokens, rows, draw, run, asked)
        ids = layout(ids)
        plain = (ids != QUESTION).all(0) & (ids != MARK).all(0)
        return cls(ids, needle, plain & plain.roll(1) & (torch.arange(len(plain)) > 0))

    def to(self, device: str) -> Planted:
        """The same texts there."""
        return replace(self, ids=self.ids.to(device), needle=self.needle.to(device), prose=self.prose.to(device))

    def losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Nats per byte of each text, and of the needle in each place where it is asked for."""
        said = torch.nn.functional.cross_entropy(logits[:, :-1].mT, self.ids[:, 1:], reduction="none")
        asked = logits[:, (self.ids == QUESTION).all(0)].mT
        wanted = self.needle[:, None].expand(-1, asked.shape[2])
        return said[:, self.prose[1:]].mean(-1), torch.nn.functional.cross_entropy(asked, wanted, reduction="none")

    @torch.no_grad()
    def score(self, net: LanguageModel) -> tuple[float, float]:
        """Share of the texts in whose last place the needle is named, and nats per byte."""
        hits, nats = 0.0, 0.0
        for i in range(0, len(self.ids), AT_ONCE):
            some = replace(self, ids=self.ids[i : i + AT_ONCE], needle=self.needle[i : i + AT_ONCE])
            logits = net(some.ids)[0]
            hits += float((logits[:, -1].argmax(-1) == some.needle).sum())
            nats += float(some.losses(logits)[0].sum())
        return hits / len(self.ids), nats / len(self.ids)


@dataclass(frozen=True)
class Study:
    """Nets of 2 layers, 4 heads and 32 channels, trained alike from several seeds.

    tokens: of a text, before its layout
    """

    tokens: int
    rows: int
    steps: int
    seeds: int
    device: str = "cpu"
    layout: Layout = torch.clone
    progress: Progress | None = None

    def setting(self, texts: str) -> str:
        """For the setting of a claim; what texts they are."""
        said = trained({name: getattr(self, name) for name in ("rows", "steps", "seeds", "device")}, texts)
        return f"2 layers of 32 channels, {said}"

    def net(self, mixer: Spec, budget: float | str = 1.0, seed: int = 0) -> LanguageModel:
        """Untrained."""
        net = LanguageModel(VOCABULARY, mixer=mixer, channels=32, layers=2, budget=budget, seed=seed)
        return net.to(self.device)

    def trained(self, mixer: Spec, budget: float | str = 1.0) -> list[LanguageModel]:
        """From every seed; on the same texts whatever the mixer."""
        found = []
        for seed in range(self.seeds):
            if self.progress is not None:
                self.progress(seed, self.seeds, f"training: {mixer}, seed {seed}")
            found.append(self._one(self.net(mixer, budget, seed), seed))
        return found

    def _one(self, net: LanguageModel, seed: int) -> LanguageModel:
        optimiser, draw = torch.optim.AdamW(net.parameters(), lr=RATE), rng.generator("claims/planted", SEED, seed)
        for step in range(self.steps):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / WARM) * (1 - step / self.steps)
            texts = self._texts(parts()[0], self.tokens, self.rows, draw)
            text, asked = texts.losses(net(texts.ids)[0])
            optimiser.zero_grad()
            (text.mean() + asked.mean()).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
        return net.eval()

    def others(self, nets: Sequence[LanguageModel], mixer: Spec, budget: float | str = 1.0) -> list[LanguageModel]:
        """Nets with these weights and other layers."""
        found = [self.net(mixer, budget).eval() for _ in nets]
        for ours, theirs in zip(found, nets):
            ours.load_state_dict(theirs.state_dict())
        return found

    def tests(self, tokens: int) -> Planted:
        """Of the part of the text that was not trained on."""
        draw = rng.generator("claims/planted/tests", SEED, tokens)
        return self._texts(parts()[1], tokens, TESTS, draw)

    def _texts(self, source: Tensor, tokens: int, rows: int, draw: torch.Generator) -> Planted:
        return Planted.draw(source, tokens, rows, draw, self.layout).to(self.device)


@dataclass(frozen=True)
class Scores:
    """Needles found and nats per byte, net by net, and the share of pairs that they computed."""

    hits: list[float]
    nats: list[float]
    pairs: float

    @classmethod
    def of(cls, nets: Sequence[LanguageModel], tests: Planted) -> Scores:
        """Each net on the same tests."""
        hits, nats = zip(*[tests.score(net) for net in nets])
        return cls(list(hits), list(nats), density(nets[0]))

    def row(self, who: str) -> dict[str, Any]:
        """For the table."""
        hits = mean_interval(self.hits)
        found = {"who": who, "needles": hits.mean, "low": hits.low, "high": hits.high}
        return found | {"nats per byte": mean_interval(self.nats).mean, "pairs": self.pairs}


def density(net: LanguageModel) -> float:
    """Share of the pairs computed in the newest forward, mean over the layers."""
    return sum(block.mixer.density() for block in net.blocks) / len(net.blocks)


def window(pairs: float, tokens: int) -> str:
    """The budget of a window of no more than this share of the pairs of a text."""
    return f"{max(1, Budget(pairs).row_tokens(tokens) - 1)}tok"  # of keys held; the token itself comes to them


def by_seed(found: Mapping[str, Scores]) -> str:
    """Needles found from every seed, in words: one that has not learnt yet is seen."""
    said = [f"{who} " + ", ".join(f"{share:.2f}" for share in scores.hits) for who, scores in found.items()]
    return f"Needles found, seed by seed: {'; '.join(said)}."


def rows(found: Mapping[str, Scores]) -> list[dict[str, Any]]:
    """The table."""
    return [scores.row(who) for who, scores in found.items()]


def machinery(mixer: str) -> Evidence:
    """The smoke tier: a layer computes what its equation says, and a small net learns with it."""
    layer = make_mixer(mixer, Slot(16, 4)).double().eval()
    x = torch.randn(2, 40, 16, generator=rng.generator("smoke"), dtype=torch.float64)
    with torch.no_grad():
        off = float((layer(x)[0] - layer.reference(x)).abs().max())
        bar = torch.finfo(torch.float32).eps * float(layer.reference(x).abs().max())
    study = Study(tokens=40, rows=8, steps=12, seeds=1)
    tests, table = study.tests(40), []
    for who, budget in (("full", 1.0), (mixer, 1.0), ("random", 0.5)):
        before, after = (Scores.of(nets, tests) for nets in ([study.net(who, budget)], study.trained(who, budget)))
        table.append({"who": who, "nats before": before.nats[0], "nats after": after.nats[0]})
    learnt = table[1]["nats after"] - table[1]["nats before"]
    checks = [
        Check("largest difference from the equation", off, off, off, bar, off <= bar),
        Check("nats per byte, after 12 steps minus before", learnt, learnt, learnt, 0.0, learnt < 0),
    ]
    return Evidence(checks, "an untrained layer, and 12 steps of 8 texts: the machinery, not the paper", table=table)


@functools.cache
def parts() -> tuple[Tensor, Tensor]:
    """Nine tenths of Moby-Dick's first chapters to train on, the last to judge by."""
    source = torch.tensor([min(byte, VOCABULARY - 1) for byte in tasks.moby_dick().encode()])
    cut = len(source) * 9 // 10
    return source[:cut], source[cut:]
