"""Retrieval heads: those that look at a fact in the text while the model copies it into its answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from saccade.core.artefact import Artefact
from saccade.core.card import Card
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.method import Probe
from saccade.core.record import Notes, Table
from saccade.core.site import Seen, Site

# kind, statement up to the answer, answer, question, beginning of the answer
NEEDLES = (
    (
        "sentence",
        " The best thing to do in San Francisco is to",
        " eat a sandwich and sit in Dolores Park on a sunny day.",
        "What is the best thing to do in San Francisco?",
        " The best thing to do in San Francisco is to",
    ),
    (
        "words",
        " The secret word of the old library is",
        " amber lantern river copper meadow.",
        "What is the secret word of the old library?",
        " The secret word of the old library is",
    ),
    (
        "sentence",
        " Every spring the baker of Lisbon gives his daughter",
        " a blue violin and two baskets of fresh oranges.",
        "What does the baker of Lisbon give his daughter every spring?",
        " Every spring the baker of Lisbon gives his daughter",
    ),
    (
        "words",
        " The password of the iron gate is",
        " velvet thunder garden pencil harbour.",
        "What is the password of the iron gate?",
        " The password of the iron gate is",
    ),
)
ASK, ANSWER = "\n\nBased on the content of the book, Question: ", "\nAnswer:"


@dataclass(frozen=True, eq=False)
class Trial:
    """One needle run. recall: share of the answer's tokens that the model said; score of every head."""

    kind: str
    depth: float
    recall: float
    score: Float[Tensor, "layers h"]


@dataclass(frozen=True)
class RetrievalHead(Probe):
    """A head's score is the share of a hidden answer that it copied: that it looked at most when the model said it.

    Greedy answers y_1 .. y_m to a question about a sentence hidden in a text, its answer k at tokens s to e - 1. In
    step t a head has copied y_t if  j = argmax_j a_j  lies in [s, e) and is the token y_t.  g is the set it copied:
    score = |g and k| / |k|,  the mean over depths, texts and needles of those runs whose answer is right.
    Attached, it tells how many tokens of a new text each head copied from the prompt.

    depths: places, from the beginning to the end of each sample, at which a needle is hidden in turn
    answer_tokens: the most that the model may say
    least_recall: a run counts if the model said at least this share of the answer's tokens
    least_score: from which mean score on a head is a retrieval head
    count: a token that was copied twice counts once ("unique") or twice ("every", whose scores may exceed 1)

    Raises:
        BadOption: fewer than two depths, or an answer of no token.
        BadInput: a sample that is too short to hide anything in.
        CannotRun: the model answered no question right, so that no head was seen copying.
    Source: arXiv 2404.15574, section 2; nightdessert/Retrieval_Head, retrieval_head_detection.py.
    """

    card = Card(
        name="retrieval-head",
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        family="probes",
        paper="arXiv:2404.15574",
        year=2024,
        authors="Wu, Wang, Xiao, Peng, Fu",
        official="nightdessert/Retrieval_Head",
        summary="Scores each head by how much of a hidden answer it looks at while the model copies it out.",
        equation="score = |{y_t : argmax_j a_tj in needle, token_j = y_t} and needle| / |needle|",
        budget="nothing, since a probe only looks on",
        calibrated=True,
        departures=(
            "Needles and questions are ours, and the answer's first words are given: small models then answer at all.",
            "|k| counts distinct tokens, as the set g does, so that a head which copies all of them scores 1.",
            "The official code counts every copy (count='every' does that) and adds up over the answer's tokens.",
            "A right answer is told by token ids: at least half of the answer's tokens are said, where the paper asks"
            " for a ROUGE-1 recall of more than 0.5.",
            "Texts of 512 tokens and 40 runs where the paper has 600 of 1,000 to 50,000 tokens.",
        ),
        lacks={
            "assisted": "guessed tokens are read together with the prompt, whose end is not to be told then",
        },
    )

    depths: int = 5
    answer_tokens: int = 24
    least_recall: float = 0.5
    least_score: float = 0.1
    count: Literal["unique", "every"] = "unique"

    def __post_init__(self):
        super().__post_init__()
        if self.depths < 2:
            raise BadOption(f"retrieval-head.depths={self.depths}", "it takes at least 2", "Leave it away for 5.")
        if self.answer_tokens < 1:
            raise BadOption("retrieval-head.answer_tokens=0", "it takes at least 1", "Leave it away for 24.")

    def check(self, site: Site) -> list[str]:
        if self.artefact is None:
            return []
        found, here = tuple(self.artefact.tensors["score"].shape), (site.layers, site.all_heads)
        return [] if found == here else [f"its scores are for {found[0]} layers of {found[1]} heads, here: {here[0]} of"
                                         f" {here[1]}"]  # fmt: skip

    def see(self, seen: Seen, site: Site) -> dict[str, Tensor]:
        """The key that each head looks at most; of a prompt only for its last token, which the first answer follows."""
        assert seen.queries is not None, "a probe is shown the queries"
        asking = site.queries if site.stage == "decode" else min(1, site.queries)
        most = looked_at(seen.queries[:, :, site.queries - asking :], seen.keys)
        return {"most": pad(most, (site.queries - asking, 0), value=-1)}

    def result(self, notes: Sequence[Notes]) -> Table:
        """Of each head: tokens after the prompt, how many of them it copied from the prompt, and its score if known."""
        found = [copies(one, max(0, one.prompt - 1), 0, one.prompt) for one in notes]
        if not found:
            return []
        said, copied = sum(x.shape[-1] for x in found), sum(x.sum(-1) for x in found)
        assert isinstance(copied, Tensor)
        known = None if self.artefact is None else self.artefact.tensors["score"]
        return [
            {"layer": i, "head": j, "tokens": said, "copied": int(copied[i, j]),
             "score": None if known is None else round(float(known[i, j]), 4)}
            for i in range(copied.shape[0]) for j in range(copied.shape[1])
        ]  # fmt: skip

    def best(self, heads: int) -> list[tuple[int, int]]:
        """(layer, head) of the highest scores, best first."""
        assert self.artefact is not None, "scores come from an artefact"
        return best_heads(self.artefact.tensors["score"], heads)

    # --- needle runs ------------------------------------------------------------------------------------------------

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        """Mean score of each head over needle runs in the samples, and in what share of them it copied at all."""
        trials = list(self.trials(model, samples, progress))
        right = [t.score for t in trials if t.recall >= self.least_recall]
        if not right:
            best = max(t.recall for t in trials)
            found = f"none of {len(trials)} answers was right; the best held {best:.0%} of what was hidden"
            raise CannotRun(f"calibrate retrieval-head on {model.name}", found, "A model that retrieves is needed.")
        runs = torch.stack(right)
        score, active = runs.mean(0), (runs > 0).float().mean(0)
        figures = {
            "right answers": f"{len(right)} of {len(trials)}",
            "heads that copied at all": int((score > 0).sum()),
            "retrieval heads": f"{int((score >= self.least_score).sum())} of {score.numel()}",
            "best, layer.head": [f"{i}.{j}: {score[i, j]:.3f}" for i, j in best_heads(score, 10)],
        }
        return model.artefact(self, {"score": score, "active": active}, samples, figures)

    def trials(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Iterator[Trial]:
        """One run for each sample and depth, needles in turn."""
        rows = model.rows(samples)
        line, runs = _ids(model.tokenizer, "\n")[-1:], itertools.product(range(len(rows)), range(self.depths))
        for done, (i, place) in enumerate(runs, 1):
            depth, needle = place / (self.depths - 1), NEEDLES[(i + place) % len(NEEDLES)]
            prompt, start, end = hide(model.tokenizer, rows[i], needle[1:], depth)
            notes = model.answer(self, prompt, self.answer_tokens, line)
            hidden, said = prompt[0, start:end], notes.tokens[prompt.shape[1] :]
            recall = float(torch.isin(hidden, said).float().mean())
            yield Trial(needle[0], depth, recall, self._score(notes, prompt.shape[1] - 1, start, end))
            if progress is not None:
                progress(done, len(rows) * self.depths, "needle runs")

    def _score(self, notes: Notes, first: int, start: int, end: int) -> Float[Tensor, "layers h"]:
        copied, said = copies(notes, first, start, end), notes.tokens[first + 1 :]
        if self.count == "every":
            return copied.float().sum(-1) / (end - start)
        hidden = notes.tokens[start:end].unique()
        return torch.stack([(copied & (said == token)).any(-1) for token in hidden]).float().mean(0)


def best_heads(score: Float[Tensor, "layers h"], count: int) -> list[tuple[int, int]]:
    """(layer, head) of the highest scores, best first."""
    order = score.flatten().argsort(descending=True, stable=True)[:count].tolist()
    return [divmod(i, score.shape[1]) for i in order]


def looked_at(q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"]) -> Int[Tensor, "b h q"]:
    """The key of the largest logit of each query, the first of several; no scale and no softcap changes which."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide).unflatten(1, (k.shape[1], -1)) @ k.to(wide)[:, :, None].mT).flatten(1, 2)
    at = torch.arange(k.shape[2], device=k.device)
    ahead = at > at[k.shape[2] - q.shape[2] :, None]
    return logits.masked_fill(ahead, -torch.inf).argmax(-1).int()


def copies(notes: Notes, first: int, start: int, end: int) -> Bool[Tensor, "layers h t"]:
    """Whether the head looked most, from each token from `first` on, at one in [start, end) that then came."""
    after = notes.tokens[first + 1 :]
    most = torch.stack([layer["most"] for layer in notes.layers])[..., first : first + len(after)].long()
    return (notes.tokens[most] == after) & (most >= start) & (most < end)


def hide(
    tokenizer: Any, sample: Int[Tensor, "1 n"], needle: tuple[str, str, str, str], depth: float
) -> tuple[Int[Tensor, "1 m"], int, int]:
    """The sample with the needle where a sentence begins at or before the depth, the question behind it; and where the
    answer stands: first token, and the one behind the last.

    Raises:
        BadInput: the sample is shorter than needle and question.
    """
    statement, answer, question, opening = needle
    before, hidden = _ids(tokenizer, statement), _ids(tokenizer, answer)
    asked = _ids(tokenizer, ASK + question + ANSWER + opening)
    text, fixed = sample[0].tolist(), len(before) + len(hidden) + len(asked)
    if len(text) < fixed:
        found = f"needle and question alone take {fixed}"
        raise BadInput(f"a needle in {len(text)} tokens", found, f"Give samples of at least {fixed} tokens.")
    stop, at = _ids(tokenizer, ".")[-1:], round(depth * len(text))
    at = next((i for i in range(at, 0, -1) if text[i - 1 : i] == stop), at)
    head = tokenizer("", add_special_tokens=True)["input_ids"][:1] + text[:at] + before
    ids = head + hidden + text[at:] + asked
    return torch.tensor([ids]), len(head), len(head) + len(hidden)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
