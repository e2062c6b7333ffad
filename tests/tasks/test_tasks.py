"""What every task promises, on tokenizers of several kinds."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade import tasks
from saccade.core.errors import BadInput, UnknownName
from saccade.tasks import multi_key, word_aggregation
from saccade.tasks._needles import DEPTHS, NeedleTask, plant, split
from saccade.tasks._text import encode, passage, sentence_start, whole
from tests.tasks import tokenizers

ALL = tasks.list_tasks()
NEEDLES = [name for name in ALL if isinstance(tasks.get(name), NeedleTask)]
HITS = [name for name in ALL if tasks.get(name).metric == "hit"]
names, tokenizer_names, seeds = st.sampled_from(ALL), st.sampled_from(tokenizers.NAMES), st.integers(0, 2**40)
lengths = st.integers(700, 2500)  # of letters; enough for every task


def samples(task: str, tokenizer: str, tokens: int, count: int, seed: int) -> list[tasks.Sample]:
    return tasks.get(task).samples(tokenizers.get(tokenizer), tokens, count, seed)


def text(tokenizer: str, ids) -> str:
    return tokenizers.get(tokenizer).decode(ids.flatten().tolist() if torch.is_tensor(ids) else list(ids))


def plain(sample: tasks.Sample) -> tuple:
    """All of a sample as something that can be compared."""
    places = torch.arange(sample.continuation.shape[1])[sample.scored].tolist()
    ids = (sample.context.flatten().tolist(), sample.continuation.flatten().tolist())
    return sample.id, *ids, places, sample.one_pass, sample.facts


def wanted(sample: tasks.Sample) -> torch.Tensor:
    return sample.continuation[0, sample.scored]


def logits(sample: tasks.Sample, vocabulary: int = 60_000) -> torch.Tensor:
    """What a model gives that knows all."""
    return torch.nn.functional.one_hot(sample.continuation[0], vocabulary).float()


# --- samples ----------------------------------------------------------------------------------------------------------


def test_the_tasks_of_the_library():
    retrieval = {"passkey", "passkey-agnostic", "multi-key", "variable-tracking", "word-aggregation"}
    assert set(ALL) >= {"loss", "continuation-loss", "perplexity", *retrieval}
    for name in ALL:
        assert tasks.get(name).name == name == tasks.get(name.replace("-", "_")).name


@given(names, tokenizer_names, lengths, st.integers(0, 12), seeds)
def test_a_sample_has_exactly_the_tokens_asked_for(name, tokenizer, tokens, index, seed):
    sample = samples(name, tokenizer, tokens, index + 1, seed)[index]
    assert sample.context.shape[1] + sample.continuation.shape[1] == tokens == sample.facts["tokens"]
    assert sample.context.shape[0] == sample.continuation.shape[0] == 1
    assert wanted(sample).numel() > 0
    assert sample.one_pass == tasks.get(name).one_pass and sample.facts["index"] == index


@given(names, tokenizer_names, lengths, st.integers(1, 6), st.integers(1, 6), seeds)
def test_the_same_seed_gives_the_same_and_more_samples_only_add(name, tokenizer, tokens, few, more, seed):
    one = list(map(plain, samples(name, tokenizer, tokens, few, seed)))
    two = list(map(plain, samples(name, tokenizer, tokens, few + more, seed)))
    assert one == two[:few] and len(two) == few + more


@given(names, tokenizer_names, lengths, seeds)
def test_samples_differ_by_index_and_by_seed(name, tokenizer, tokens, seed):
    here = [s.context.tolist() for s in samples(name, tokenizer, tokens, 8, seed)]
    there = [s.context.tolist() for s in samples(name, tokenizer, tokens, 8, seed + 1)]
    assert all(a not in here[:i] for i, a in enumerate(here))
    assert here != there
    assert len({s.id for s in samples(name, tokenizer, tokens, 8, seed)}) == 8


def digest() -> str:
    """Of some samples of every task."""
    made = [[plain(s) for s in samples(name, "merges", 700, 3, 5)] for name in ALL]
    return hashlib.sha256(repr(made).encode()).hexdigest()


def python(program: str) -> str:
    """What another process prints; it hashes strings differently."""
    paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
    there = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": paths}
    return subprocess.run([sys.executable, "-c", program], env=there, capture_output=True, text=True, check=True).stdout


def test_another_process_makes_the_same_samples():
    assert python("from tests.tasks.test_tasks import digest; print(digest())").strip() == digest()


# --- text and question ------------------------------------------------------------------------------------------------


@given(st.sampled_from(HITS), tokenizer_names, lengths, st.integers(0, 12), seeds)
def test_what_is_scored_is_the_answer_and_no_mere_space(name, tokenizer, tokens, index, seed):
    sample = samples(name, tokenizer, tokens, index + 1, seed)[index]
    answer = "".join(sample.facts["answer"].split(", "))
    assert text(tokenizer, wanted(sample)).replace(" ", "") == answer
    assert text(tokenizer, wanted(sample)[:1]).strip()


@given(st.sampled_from(HITS), tokenizer_names, lengths, st.integers(0, 12), seeds)
def test_the_question_is_in_the_context_only_if_the_task_says_so(name, tokenizer, tokens, index, seed):
    sample = samples(name, tokenizer, tokens, index + 1, seed)[index]
    context, continuation = text(tokenizer, sample.context), text(tokenizer, sample.continuation)
    question = max(context.rfind("?"), context.rfind("Follow the variables"))
    if tasks.get(name).query_aware:
        assert question > len(context) - 80 and "?" not in continuation
    else:
        assert "?" in continuation and "pass key is" not in context[-20:]


@pytest.mark.parametrize("name", ALL)
def test_titles_say_where_the_question_comes_after_compression(name):
    task = tasks.get(name)
    assert ("query-agnostic" in task.title) == (task.query_aware is False)


@given(st.sampled_from(NEEDLES), tokenizer_names, st.integers(700, 2500), st.integers(0, 12), seeds)
def test_needles_lie_at_their_depth_and_nowhere_else(name, tokenizer, tokens, index, seed):
    riddle = tasks.get(name).riddle(index, seed)
    context = text(tokenizer, samples(name, tokenizer, tokens, index + 1, seed)[index].context)
    room = sum(len(statement) for _, statement in riddle.needles)
    for depth, statement in riddle.needles:
        assert context.count(statement) == 1
        place = (context.index(statement) - len(riddle.intro)) / (len(context) - len(riddle.intro))
        slack = (room + 80 + 64 * 8) / len(context)  # needles, question, and the way back to a sentence's start
        assert depth - slack <= place <= depth + slack


@given(st.sampled_from(NEEDLES), seeds, st.integers(0, 20))
def test_facts_say_depth_and_answer_and_depths_take_turns(name, seed, index):
    found = [s.facts for s in samples(name, "merges", 700, 5, seed)]
    assert sorted(f["depth"] for f in found) == list(DEPTHS)
    riddle = tasks.get(name).riddle(index, seed)
    said = " ".join(statement for _, statement in riddle.needles)
    assert all(wanted.strip() in said for _, wanted in riddle.steps)


@given(seeds, st.integers(0, 20))
def test_pass_keys_are_the_same_before_and_after_the_question(seed, index):
    aware, agnostic = tasks.get("passkey"), tasks.get("passkey-agnostic")
    assert aware.riddle(index, seed) == agnostic.riddle(index, seed)
    one, two = (t.samples(tokenizers.get("merges"), 700, index + 1, seed)[index] for t in (aware, agnostic))
    both = [torch.cat([s.context, s.continuation], 1).tolist() for s in (one, two)]
    assert both[0] == both[1] and one.context.shape[1] > two.context.shape[1]


@given(seeds, st.integers(0, 20))
def test_one_of_four_keys_is_asked_for_and_they_differ(seed, index):
    riddle = tasks.get("multi-key").riddle(index, seed)
    keys = [statement.split()[-1].rstrip(".") for _, statement in riddle.needles]
    assert len(set(keys)) == multi_key.KEYS and len({depth for depth, _ in riddle.needles}) == multi_key.KEYS


@given(tokenizer_names, lengths, st.integers(0, 12), seeds)
def test_the_answer_is_the_most_frequent_word_of_every_half(tokenizer, tokens, index, seed):
    sample = samples("word-aggregation", tokenizer, tokens, index + 1, seed)[index]
    words = [w.strip(".") for w in text(tokenizer, sample.context).split() if w.strip(".") in word_aggregation.WORDS]
    counts = Counter(words)
    assert counts.most_common(1)[0][0] == sample.facts["answer"]
    assert counts[sample.facts["answer"]] / len(words) == pytest.approx(sample.facts["share"], abs=5 / len(words))


def test_chance_is_that_of_a_guesser_who_knows_the_format():
    assert tasks.get("multi-key").chance == 1 / multi_key.KEYS
    assert tasks.get("word-aggregation").chance == pytest.approx(1 / len(word_aggregation.WORDS), rel=0.05)
    assert len(set(word_aggregation.WORDS)) == len(word_aggregation.WORDS)
    assert all((tasks.get(n).chance is None) == (tasks.get(n).metric == "nll") for n in ALL)


@given(tokenizer_names, st.integers(32, 3000), seeds)
def test_loss_is_of_the_end_of_a_passage_of_the_text(tokenizer, tokens, seed):
    sample = samples("loss", tokenizer, tokens, 1, seed)[0]
    assert wanted(sample).numel() == min(512, tokens // 2) == sample.continuation.shape[1]
    start = 1 if tokenizer == "start" else 0
    ids = torch.cat([sample.context, sample.continuation], 1)[0, start:].tolist()
    at = sample.facts["text_start"]
    assert tuple(ids) == whole(tokenizers.get(tokenizer))[at : at + len(ids)]
    assert (sample.context[0, 0] == 0) == bool(start), "the start token comes first where the tokenizer has one"


# --- pieces -----------------------------------------------------------------------------------------------------------


@given(tokenizer_names, st.sampled_from(["What is it? It is", "VAR x =", "\n\nThe", "is the"]), st.integers(0, 99_999))
def test_question_and_answer_are_tokens_of_the_two_side_by_side(tokenizer, question, number):
    it = tokenizers.get(tokenizer)
    given_ids, answer = split(it, question, f" {number}")
    assert given_ids + answer == encode(it, f"{question} {number}")
    assert it.decode(answer).strip() == str(number)


@given(tokenizer_names, st.lists(st.floats(0, 1), min_size=1, max_size=4), seeds)
def test_planting_adds_needles_and_loses_nothing(tokenizer, depths, seed):
    it = tokenizers.get(tokenizer)
    body, _ = passage(it, 400, 0, seed)
    needles = [(depth, [-i - 1] * 3) for i, depth in enumerate(depths)]  # ids that no tokenizer has
    found = plant(it, body, needles)
    assert [x for x in found if x >= 0] == body
    planted = [x for x in found if x < 0]
    assert sorted(planted) == sorted(x for _, ids in needles for x in ids)
    order = [-x - 1 for x in planted[::3]]
    assert [depths[i] for i in order] == sorted(depths)


@given(tokenizer_names, st.integers(0, 5000))
def test_a_sentence_begins_after_the_end_of_another(tokenizer, position):
    it = tokenizers.get(tokenizer)
    ids = whole(it)
    at = sentence_start(it, ids, position)
    assert max(0, position - 64) <= at <= position
    if 0 < at < position:
        assert it.decode([ids[at - 1]]).rstrip()[-1:] in '.!?"'


@given(seeds, st.integers(1000, 4000))
def test_passages_are_spread_over_the_text(seed, tokens):
    it = tokenizers.get("merges")
    starts = sorted(passage(it, tokens, i, seed)[1] for i in range(20))
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert max(gaps) < (len(whole(it)) - tokens) / 5


# --- scores -----------------------------------------------------------------------------------------------------------


@given(st.sampled_from(HITS), st.integers(0, 8), seeds, st.data())
def test_a_hit_is_every_wanted_token_and_nothing_else(name, index, seed, data):
    sample, task = samples(name, "merges", 700, index + 1, seed)[index], tasks.get(name)
    right = logits(sample)
    assert task.score(right, sample) == 1.0
    places = torch.arange(right.shape[0])[sample.scored].tolist()
    wrong = right.clone()
    place = data.draw(st.sampled_from(places))
    wrong[place] = wrong[place].roll(1)
    assert task.score(wrong, sample) == 0.0
    others = [p for p in range(right.shape[0]) if p not in places]
    right[others] = right[others].roll(1, -1)
    assert task.score(right, sample) == 1.0


@given(st.sampled_from(["loss", "continuation-loss"]), seeds)
def test_loss_is_the_mean_surprise_in_nats(name, seed):
    sample, task = samples(name, "letters", 80, 1, seed)[0], tasks.get(name)
    rows = torch.randn(sample.continuation.shape[1], 128, generator=torch.Generator().manual_seed(seed))
    exact = -rows.double().log_softmax(-1).gather(1, sample.continuation.mT).mean()
    assert task.score(rows, sample) == pytest.approx(float(exact), rel=1e-5)
    flat = torch.zeros_like(rows)
    assert task.score(flat, sample) == pytest.approx(torch.tensor(128.0).log().item(), rel=1e-6)


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("tokenizer", ["letters", "merges", "start"])
def test_too_few_tokens_are_refused_and_the_least_number_works(name, tokenizer):
    with pytest.raises(BadInput, match=rf"^{name} in 20 tokens: .*\. Ask for") as caught:
        samples(name, tokenizer, 20, 1, 0)
    least = int(caught.value.do.rstrip(".").split()[-1])
    assert samples(name, tokenizer, least, 1, 0)[0].facts["tokens"] == least
    with pytest.raises(BadInput):
        samples(name, tokenizer, least - 1, 1, 0)


@pytest.mark.parametrize("name", sorted({"loss", "perplexity", *NEEDLES}))
def test_more_than_the_shipped_text_is_refused(name):
    with pytest.raises(BadInput, match=r"a passage of \d+ tokens: the shipped text has \d+\. Ask for fewer tokens\."):
        samples(name, "letters", 400_000, 1, 0)


def test_an_unknown_task_is_answered_with_the_nearest():
    with pytest.raises(UnknownName, match=r"no task 'passkeys': \d+ are known\. Did you mean 'passkey'"):
        tasks.get("passkeys")
    with pytest.raises(UnknownName, match="no task 'zzz'"):
        tasks.describe("zzz")


@pytest.mark.parametrize("name", ALL)
def test_the_description_is_what_the_class_says(name):
    task, said = tasks.get(name), tasks.describe(name)
    for field in ("name", "title", "metric", "query_aware", "one_pass", "chance", "spread"):
        assert said[field] == getattr(task, field)
    assert said["about"].split()[0] == task.__doc__.split()[0] and task.spread > 0


def test_tasks_are_described_without_torch():
    program = "import sys; from saccade import tasks; [tasks.describe(n) for n in tasks.list_tasks()]; "
    assert python(program + "print('torch' in sys.modules)").strip() == "False"


@given(tokenizer_names, st.integers(64, 700), seeds)
def test_windows_of_the_perplexity_follow_on_one_another_and_count_each_token_once(tokenizer, tokens, seed):
    made = samples("perplexity", tokenizer, tokens, 4, seed)
    scored = [s.continuation[0].tolist() for s in made]
    first = [s.facts["text_start"] for s in made]
    for (a, before), (b, after) in itertools.pairwise(zip(first, made)):
        if b > a:  # else the text came to its end
            assert b - a == len(scored[0])
            text_before = after.context[0].tolist()[-len(scored[0]) :]
            assert text_before == before.continuation[0].tolist()
