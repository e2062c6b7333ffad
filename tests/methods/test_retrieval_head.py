"""Retrieval heads against plain loops: what a head looks at, what it copied, which runs count, and what is shipped."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.attach import attach, fingerprint
from saccade.attach.calibration import Subject
from saccade.core.artefact import Artefact
from saccade.core.errors import BadInput, BadOption, CannotRun
from saccade.core.paths import SHIPPED
from saccade.core.record import Notes
from saccade.methods.probes.retrieval_head import NEEDLES, RetrievalHead, copies, hide, looked_at
from tests.conformance.runs import kernel
from tests.methods.handmade import noise, tiny, tokens

LAYERS, HEADS = 2, 3


class Letters:
    """A tokenizer of single letters, so that nothing runs together."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1] * add_special_tokens + [ord(x) for x in text]}


def made(score) -> Artefact:
    score = torch.as_tensor(score)
    return Artefact("retrieval-head", {"score": score, "active": (score > 0).float()}, "tiny", "")


# --- what a head looks at ---------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([(4, 2), (3, 1), (2, 2)]), st.booleans())
@settings(deadline=None)
def test_the_key_of_the_largest_logit_the_first_of_several(queries, keys, heads, even):
    queries, (h, g) = min(queries, keys), heads
    q, k = noise(2, h, queries, 4, name="q"), noise(2, g, keys, 4, name="k")
    q, k = (q.round(), k.round()) if even else (q, k)  # whole numbers often give equal logits
    found = looked_at(q, k)
    for b in range(2):
        for head in range(h):
            for i in range(queries):
                seen = range(keys - queries + i + 1)
                logits = [float((q[b, head, i] * k[b, head // (h // g), j]).sum()) for j in seen]
                most = int(found[b, head, i])
                assert logits[most] == max(logits) or not even
                assert most == logits.index(max(logits)) or not even
                torch.testing.assert_close(torch.tensor(logits[most]), torch.tensor(max(logits)))


def test_a_model_is_seen_as_its_own_eager_maps_say():
    """What a probe notes of a generation is the arg-max of the maps that transformers gives out."""
    model, ids, new = tiny(), tokens(20), 6
    with attach(model, RetrievalHead()) as run:
        whole = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    with kernel(model, "eager"), torch.no_grad():
        maps = model(whole[:, :-1], output_attentions=True, use_cache=False).attentions
    (one,) = run.notes()
    assert one.prompt == 20 and one.tokens.tolist() == whole[0, :-1].tolist()
    for layer, weights in zip(one.layers, maps):
        assert torch.equal(layer["most"][:, 19:].long(), weights[0, :, 19:].argmax(-1))
        assert (layer["most"][:, :19] == -1).all()
    table = run.result()
    assert [(row["layer"], row["head"]) for row in table] == [(i, j) for i in range(2) for j in range(4)]
    for row in table:
        copied = 0
        for at in range(19, 25):
            most = int(maps[row["layer"]][0, row["head"], at].argmax())
            copied += at + 1 < 25 and most < 20 and int(whole[0, most]) == int(whole[0, at + 1])
        assert (row["copied"], row["tokens"], row["score"]) == (copied, 5, None)


def test_known_scores_stand_in_the_table():
    model, ids = tiny(), tokens(9)
    score = torch.arange(8.0).view(2, 4) / 10
    probe = RetrievalHead(artefact=dataclasses.replace(made(score), fingerprint=fingerprint(model)))
    with attach(model, probe) as run:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert [row["score"] for row in run.result()] == [i / 10 for i in range(8)]


# --- what it copied ---------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(3, 14), st.integers(1, 8), st.sampled_from(["unique", "every"]))
def test_the_score_is_what_plain_loops_count(data, prompt, said, count):
    letters = st.integers(0, 3)
    ids = data.draw(st.lists(letters, min_size=prompt + said, max_size=prompt + said))
    start = data.draw(st.integers(0, prompt - 1))
    end = data.draw(st.integers(start + 1, prompt))
    first, read = prompt - 1, prompt + said - 1  # the last token that was said was not read
    most = torch.tensor([[[data.draw(st.integers(0, i)) for i in range(read)] for _ in range(HEADS)] for _ in "ab"])
    notes = Notes(torch.tensor(ids), first, [{"most": x} for x in most])
    found = RetrievalHead(count=count)._score(notes, first, start, end)
    for layer in range(LAYERS):
        for head in range(HEADS):
            hits = []
            for step in range(said):
                j, y = int(most[layer, head, first + step]), ids[prompt + step]
                hits += [y] if start <= j < end and ids[j] == y else []
            hidden = ids[start:end]
            wanted = len(set(hits)) / len(set(hidden)) if count == "unique" else len(hits) / len(hidden)
            assert float(found[layer, head]) == pytest.approx(wanted)


@pytest.mark.parametrize("count", ["unique", "every"])
def test_a_head_that_copies_the_needle_scores_one(count):
    """tokens 5 to 9 hidden at 3 .. 7, said after a prompt of 12; head 0 looks at each of them in turn, head 1 at the
    token after, as an induction head does that comes one step late."""
    ids = [1, 2, 3, 5, 6, 7, 8, 9, 3, 2, 1, 4, 5, 6, 7, 8, 9]
    most = torch.zeros(1, 2, 16, dtype=torch.int)
    most[0, 0, 11:], most[0, 1, 11:] = torch.arange(3, 8), torch.arange(4, 9)
    score = RetrievalHead(count=count)._score(Notes(torch.tensor(ids), 11, [{"most": most[0]}]), 11, 3, 8)
    assert score.tolist() == [[1.0, 0.0]]


def test_what_was_not_looked_at_is_not_copied():
    notes = Notes(torch.tensor([5, 5, 5]), 2, [{"most": torch.full((1, 3), -1)}])
    assert not copies(notes, 0, 0, 3).any()


def test_without_a_prompt_nothing_is_copied_from_it():
    notes = Notes(torch.tensor([5, 5, 5]), 0, [{"most": torch.zeros(1, 3, dtype=torch.int)}])
    (row,) = RetrievalHead().result([notes])
    assert (row["tokens"], row["copied"]) == (2, 0)


def test_the_best_heads_come_first():
    assert RetrievalHead(artefact=made([[0.1, 0.9], [0.5, 0.1]])).best(3) == [(0, 1), (1, 0), (0, 0)]
    assert RetrievalHead().result([]) == []


# --- needle runs ------------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.integers(0, 3), st.integers(0, 300))
@settings(deadline=None)
def test_a_needle_stands_where_a_sentence_begins_and_is_asked_for(depth, which, more):
    text = ("A whale. A ship! A sea. " * 40)[: 300 + more]
    sample = torch.tensor([[ord(x) for x in text]])
    _, statement, answer, question, opening = NEEDLES[which]
    ids, start, end = hide(Letters(), sample, NEEDLES[which][1:], depth)
    said = "".join(map(chr, ids[0, 1:].tolist()))
    assert ids[0, 0] == 1 and "".join(map(chr, ids[0, start:end].tolist())) == answer
    before, after = said.split(statement + answer)
    assert said.endswith(question + "\nAnswer:" + opening)
    assert before + after.partition("\n\nBased on")[0] == text
    at, wanted = len(before), round(depth * len(text))
    assert at <= wanted and (at == wanted or text[at - 1] == ".")
    assert "." not in text[at:wanted] or at == wanted


def test_a_short_sample_is_refused():
    with pytest.raises(BadInput, match=r"a needle in 5 tokens: needle and question alone take (\d+)\. .* at least \1 "):
        hide(Letters(), torch.zeros(1, 5, dtype=torch.long), NEEDLES[0][1:], 0.5)


class Told:
    """Stands in for a model under calibration: run i is answered right or not, and heads copy as told."""

    name, tokenizer = "told", Letters()

    def __init__(self, right):
        self.right, self.runs = list(right), 0

    def rows(self, samples):
        return samples

    def answer(self, probe, prompt, most, stops):
        assert list(stops) == [ord("\n")] and most == probe.answer_tokens
        text = "".join(map(chr, prompt[0].tolist()))
        answer = next(n[2] for n in NEEDLES if n[1] + n[2] in text)
        start, n = text.index(answer), prompt.shape[1]
        said = [ord(x) for x in answer] if self.right[self.runs] else [ord("#")] * len(answer)
        looked = torch.zeros(1, 2, n + len(said) - 1, dtype=torch.int)
        looked[0, 0, n - 1 :] = torch.arange(start, start + len(answer))
        self.runs += 1
        return Notes(torch.cat([prompt[0], torch.tensor(said)]), n - 1, [{"most": looked[0]}])

    def artefact(self, method, tensors, samples, figures):
        return SimpleNamespace(tensors=tensors, figures=figures)


@pytest.mark.parametrize("right", [[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0]])
def test_only_runs_with_a_right_answer_count(right):
    samples, told = [torch.tensor([[ord("x")] * 300])] * 2, []
    found = RetrievalHead(depths=2).calibrate(Told(right), samples, lambda *done: told.append(done))
    assert found.tensors["score"].tolist() == found.tensors["active"].tolist() == [[1.0, 0.0]]
    assert found.figures["right answers"] == f"{sum(right)} of 4"
    assert found.figures["retrieval heads"] == "1 of 2" and found.figures["best, layer.head"][0] == "0.0: 1.000"
    assert told == [(i, 4, "needle runs") for i in (1, 2, 3, 4)]


def test_needles_depths_and_texts_are_all_met():
    samples = [torch.tensor([[ord("x")] * 300])] * 4
    trials = list(RetrievalHead().trials(Told([1] * 20), samples))
    assert sorted({t.depth for t in trials}) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [t.kind for t in trials].count("words") == [t.kind for t in trials].count("sentence") == 10
    assert all(t.recall == 1 for t in trials)


def test_a_model_that_answers_nothing_is_refused():
    samples = [torch.tensor([[ord("x")] * 300])] * 2
    said = r"calibrate retrieval-head on told: none of 4 answers was right; the best held 0% of what was hidden\."
    with pytest.raises(CannotRun, match=said):
        RetrievalHead(depths=2).calibrate(Told([0] * 4), samples)


@pytest.mark.parametrize("most", [1, 7])
def test_an_answer_is_what_generate_gives(most):
    model, prompt = tiny(), tokens(12)
    notes = Subject(model).answer(RetrievalHead(), prompt, most, [])
    wanted = model.generate(prompt, max_new_tokens=most, do_sample=False)[0].tolist()
    stop = next((i for i in range(12, len(wanted)) if wanted[i] == model.generation_config.eos_token_id), len(wanted))
    assert notes.tokens.tolist() == wanted[: stop + 1] and notes.prompt == 11
    assert notes.layers[0]["most"].shape == (4, len(notes.tokens) - 1)
    first = wanted[12]
    assert Subject(model).answer(RetrievalHead(), prompt, 7, [first]).tokens.tolist() == wanted[:13]


# --- options, artefacts -----------------------------------------------------------------------------------------------


def test_options_that_leave_nothing_are_refused():
    with pytest.raises(BadOption, match=r"retrieval-head\.depths=1: it takes at least 2\. Leave it away for 5\."):
        RetrievalHead(depths=1)
    with pytest.raises(BadOption, match=r"retrieval-head\.answer_tokens=0: it takes at least 1\. Leave it away"):
        RetrievalHead(answer_tokens=0)


def test_shipped_scores_are_those_of_smollm2():
    shipped = Artefact.load(SHIPPED / "retrieval-head" / "smollm2")
    assert shipped.method == "retrieval-head" and shipped.tensors.keys() == {"score", "active"}
    for score in shipped.tensors.values():
        assert score.shape == (30, 9) and score.dtype == torch.float32 and ((score >= 0) & (score <= 1)).all()
