"""Many requests on one model: each gets what it would get alone, memory stays bounded, failures stay small."""

from __future__ import annotations

import threading
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach import caches
from saccade.core.errors import BadOption, CannotRun
from saccade.engines.serve.jobs import Refused, Wish
from saccade.engines.serve.service import Limits
from saccade.measure.bytes import cache_bytes
from tests.engines.serve.helpers import PATIENCE_SECONDS, Client, alone, greedy, ids, service, until
from tests.measure import small

GREEDY = Wish(temperature=0.0)
LENGTHS = (40, 1, 150, 41, 150, 5, 90)
STARTS = (0, 0, 0, 0, 7, 3, 0)
COUNTS = (9, 12, 1, 7, 12, 3, 5)
PROMPTS = [ids(n, start) for n, start in zip(LENGTHS, STARTS)]
HANDING_ON = "tidaldecode:dense_layers=1,reselect_layer=none"  # needs some layers
READING_AGAIN = f"{HANDING_ON},correct_tokens=4"
METHODS = ["full", "knorm", "snapkv", "streaming", "hip", "minference+snapkv", "oracle-topk", "recycled-attention",
           "random", "random:part=decode", HANDING_ON, READING_AGAIN]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_tokens_are_those_of_generate_alone(method):
    model = models.tiny("llama", layers=6) if HANDING_ON in method else small.model()
    with service(method, model, batch=4, prefill_chunk=32) as s:
        clients = [Client(s, p, greedy(n)) for p, n in zip(PROMPTS, COUNTS)]
        tokens, found = [c.tokens() for c in clients], s.health()
    assert tokens == alone(method, PROMPTS, COUNTS, model)
    assert found["memory"]["bytes_reserved"] == found["running"] == found["waiting"] == 0
    reuse = found["prefixes"]
    assert bool(reuse["why_not"]) != bool(reuse["hits"]) and found["batching"]["together"] == (method != READING_AGAIN)


@settings(max_examples=5)
@given(st.lists(st.tuples(*map(st.integers, (1, 1, 0), (60, 9, 40))), min_size=1, max_size=8), st.data())
def test_who_comes_when_changes_nothing(requests, data):
    prompts = [ids(length, start) for length, _, start in requests]
    limits = {"batch": st.integers(1, 4), "prefixes": st.integers(0, 3), "prefill_chunk": st.sampled_from([0, 3, 20])}
    with service("snapkv", **{name: data.draw(numbers) for name, numbers in limits.items()}) as s:
        clients = []
        for prompt, (_, count, _) in zip(prompts, requests):
            clients.append(Client(s, prompt, greedy(count)))
            if data.draw(st.booleans()):
                until(lambda job=clients[-1].job: job.tokens)
        found = [c.tokens() for c in clients]
    assert found == alone("snapkv", prompts, [count for _, count, _ in requests])


def test_sixty_four_at_once():
    prompts = [ids(10 + n % 7, n) for n in range(64)]
    with service(batch=16, queue=64) as s:
        clients = [Client(s, p, greedy(6)) for p in prompts]
        found = [c.tokens() for c in clients]
    assert found == alone("full", prompts, [6] * 64)


def test_a_seed_gives_the_same_whoever_else_is_there():
    wish = Wish(8, temperature=1.0, seed=5)
    with service(prefixes=0) as s:
        by_itself = Client(s, ids(30), wish).tokens()
        clients = [Client(s, ids(20 + i), Wish(9)) for i in range(3)] + [Client(s, ids(30), wish)]
        assert clients[-1].tokens() == by_itself
        others = {tuple(Client(s, ids(30), Wish(8, seed=n)).tokens()) for n in range(4)}
        free = {tuple(Client(s, ids(30), Wish(8)).tokens()) for _ in range(3)}
    assert len(others) > 1 and len(free) > 1


def test_a_stop_string_ends_the_text_before_it():
    with service() as s:
        told = Client(s, ids(30), greedy(30)).all()
        text = "".join(e.text for e in told)
        stop = text[10:12]
        cut = Client(s, ids(30), Wish(30, 0.0, stop=(stop,))).all()
    assert "".join(e.text for e in cut) == text[: text.find(stop)] and cut[-1].finish == "stop"
    assert told[-1].finish in ("stop", "length")


def test_a_prompt_that_begins_alike_is_not_read_again():
    with service(prefixes=2) as s:
        first, again = Client(s, ids(100), greedy(2)), None
        first.tokens()
        again = Client(s, [*ids(90), *ids(10, 3)], greedy(2))
        again.tokens()
        assert (first.job.reused_tokens, again.job.reused_tokens) == (0, 90)
        Client(s, ids(30, 1), greedy(1)).tokens()
        assert s.health()["prefixes"]["kept"] == 2
        far = Client(s, ids(60, 2), greedy(1))
        far.tokens()
        assert s.health()["prefixes"]["kept"] == 2 and far.job.reused_tokens == 0


def test_kept_prompts_make_room_for_requests():
    with service(prefixes=8, cache_bytes=200 * 1024) as s:
        seen = []
        for start in range(8):
            Client(s, ids(100, start), greedy(2)).tokens()
            memory = s.health()["memory"]
            seen.append(memory["bytes_prefixes"])
            assert memory["bytes_prefixes"] + memory["bytes_reserved"] <= memory["bytes_most"]
        assert max(seen) > 0
        Client(s, ids(300), greedy(2)).tokens()
        assert s.health()["prefixes"]["kept"] < 8


def together(s, lengths, counts):
    """Clients that are there before the first turn, and per client how much each had when that one got its last."""
    go, turn, ends = threading.Event(), s._turn, {}
    s._turn = lambda: (go.wait(PATIENCE_SECONDS), turn())
    clients = [Client(s, ids(length, i), greedy(count)) for i, (length, count) in enumerate(zip(lengths, counts))]

    def listen(client, deliver):
        def told(event):
            if event.last:
                ends[client] = [len(c.job.tokens) for c in clients]
            deliver(event)

        return told

    for client in clients:
        client.job.deliver = listen(client, client.job.deliver)
    go.set()
    return [c.tokens() for c in clients], [ends[c] for c in clients]


@pytest.mark.parametrize("method", ["full", "snapkv", "streaming", "quest:dense_layers=0"])
def test_who_is_answered_goes_on_while_a_long_prompt_is_read(method):
    with service(method, prefill_chunk=4, prefixes=0) as s:
        tokens, ends = together(s, [10, 300, 20], [30, 2, 5])
    assert ends[0][1] == ends[2][1] == 0, "the short ones had to wait"
    assert tokens == alone(method, [ids(10), ids(300, 1), ids(20, 2)], [30, 2, 5])


def test_short_prompts_do_not_hold_up_a_long_one_for_ever():
    with service(prefill_chunk=4, prefixes=0, batch=16) as s:
        _, ends = together(s, [40] + [8] * 15, [1] + [2] * 15)
    assert ends[0].count(0) > 0, "the long one came last"


def test_whole_prompts_are_read_in_one_forward_where_they_must_and_it_is_said():
    for method, chunk, pieces in (("snapkv", 16, 4), ("snapkv", 0, 1), ("minference", 16, 1)):
        with service(method, prefill_chunk=chunk, prefixes=0) as s:
            with mock.patch.object(s._prompts, "read", wraps=s._prompts.read) as read:
                Client(s, ids(50), greedy(1)).tokens()
            found, said = s.health()["prefill"], " ".join(s.notes())
        assert read.call_count == pieces and found["chunk_tokens"] == (chunk if pieces > 1 else 0)
        assert ("waits while a prompt is read: minference reads a prompt as a whole" in said) == bool(found["why_not"])


def test_who_leaves_while_its_prompt_is_read_is_dropped():
    with service(prefill_chunk=1, prefixes=0) as s:
        leaves = Client(s, ids(370), greedy(3))
        until(lambda: s.health()["prefill"]["reading"])
        s.cancel(leaves.job)
        assert Client(s, ids(5), greedy(2)).tokens()
        until(lambda: s.health()["running"] == 0)
        assert s.health()["ended"] == {"finished": 1, "cancelled": 1, "failed": 0} and not leaves.job.tokens


# --- bounds -----------------------------------------------------------------------------------------------------------


def refused(s, prompt, wish) -> Refused:
    with pytest.raises(Refused) as caught:
        Client(s, prompt, wish)
    return caught.value


def test_what_can_never_run_is_refused_with_the_numbers():
    with service() as s:
        error = refused(s, ids(300), greedy(4000))
        assert error.status == 400 and error.code == "context_length_exceeded"
        assert str(error) == (
            "read 300 tokens and write 4,000: this model has 4,096 positions."
            " Send a shorter prompt or ask for fewer new tokens."
        )
        assert str(refused(s, [], greedy(1))) == "serve a request: its prompt has no tokens. Give some text."
        assert "read 4,200 tokens and write 1: this model" in str(refused(s, [5] * 4200, GREEDY))
    with service(request_tokens=20) as s:
        assert "this server takes 20 tokens a request" in str(refused(s, ids(15), greedy(6)))
        assert len(Client(s, ids(15), greedy(5)).tokens()) == 5
        assert len(Client(s, ids(15), GREEDY).tokens()) == 5  # as many as there is room for
    with service(cache_bytes=10_000) as s:
        each = s.memory.bytes_per_token
        assert f"the 10,000 bytes for caches hold {10_000 // each} tokens of {each} bytes, beside 0 for" in str(
            refused(s, ids(15), greedy(100))
        )


def test_memory_that_cannot_hold_any_request_is_said_at_the_start():
    with pytest.raises(CannotRun, match="serve requests of a token and an answer: the 600 bytes for caches hold 1 tok"):
        service(cache_bytes=600).__enter__()
    assert not hasattr(small.model(), "_saccade_run")


def test_methods_that_cannot_run_are_said_at_the_start():
    with pytest.raises(CannotRun, match="no gates were trained"):
        service("duo-attention").__enter__()


@pytest.mark.parametrize("name", ["batch", "queue", "cache_bytes", "new_tokens", "request_tokens"])
def test_limits_are_numbers_from_one(name):
    with pytest.raises(BadOption, match=f"{name}=0: it must be 1 or more. Give such a number."):
        Limits(**{name: 0})


@pytest.mark.parametrize("name", ["prefixes", "prefill_chunk"])
def test_others_may_be_nought(name):
    assert vars(Limits(**{name: 0}))[name] == 0
    with pytest.raises(BadOption, match=f"{name}=-1: it must be 0 or more. Give such a number."):
        Limits(**{name: -1})


def held(s) -> threading.Event:
    """The next step waits for it."""
    go, step = threading.Event(), s._step
    s._step = lambda batch: (go.wait(PATIENCE_SECONDS), step(batch))
    return go


def test_a_full_queue_is_said_and_what_was_taken_on_is_done():
    with service(batch=1, queue=2) as s:
        go = held(s)
        first = Client(s, ids(20), greedy(3))
        until(lambda: s.health()["running"] == 1)
        waiting = [Client(s, ids(20), greedy(3)) for _ in range(2)]
        error = refused(s, ids(20), greedy(3))
        assert (error.status, error.code) == (429, "queue_full") and "2 requests are waiting already" in str(error)
        go.set()
        assert [len(c.tokens()) for c in (first, *waiting)] == [3, 3, 3]


def test_what_does_not_fit_beside_others_waits():
    with service(cache_bytes=80 * 1024) as s:
        clients = [Client(s, ids(80), greedy(4)) for _ in range(4)]  # two of them fit
        most = 0
        while not all(c.job.tokens[3:] for c in clients):
            most = max(most, s.health()["memory"]["bytes_reserved"])
        assert [len(c.tokens()) for c in clients] == [4] * 4
    assert 0 < most <= 80 * 1024


@pytest.mark.parametrize("method", ["full", "snapkv", "streaming", "recycled-attention"])
@settings(max_examples=3)
@given(st.lists(st.tuples(st.integers(1, 150), st.integers(1, 6)), min_size=2, max_size=6))
def test_caches_never_take_more_than_they_may(method, requests):
    """Short rows beside a long one are padded where nothing is attached."""
    held, most = [], 120 * 1024
    with service(method, cache_bytes=most, prefixes=0) as s:
        step = s._step
        s._step = lambda batch: (step(batch), held.append(sum(cache_bytes(b.cache) for b in s._batches if b.rows)))
        clients = [Client(s, ids(length), greedy(count)) for length, count in requests]
        assert [len(c.tokens()) for c in clients]
    assert max(held, default=0) <= most


# --- leaving, failing, closing ----------------------------------------------------------------------------------------


def test_who_leaves_is_dropped_and_the_others_go_on():
    with service() as s:
        leaves = Client(s, ids(40), greedy(4000), cancel_after=3)
        stays = Client(s, ids(50, 3), greedy(30))
        assert stays.tokens() == alone("full", [ids(50, 3)], [30])[0]
        until(lambda: s.health()["running"] == 0)
        assert s.health()["ended"] == {"finished": 1, "cancelled": 1, "failed": 0}
        assert len(leaves.job.tokens) < 4000 and s.health()["memory"]["bytes_reserved"] == 0


def test_who_leaves_while_waiting_is_never_read():
    with service(batch=1) as s:
        go = held(s)
        first = Client(s, ids(20), greedy(3))
        until(lambda: s.health()["running"] == 1)
        second, third = (Client(s, ids(20), greedy(3)) for _ in range(2))
        s.cancel(second.job)
        go.set()
        assert third.tokens() and not second.job.tokens and first.tokens()
        assert s.health()["ended"] == {"finished": 2, "cancelled": 1, "failed": 0}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ZeroDivisionError("secret"), 500, "serve a request: the model failed with a ZeroDivisionError. The server"),
        (torch.OutOfMemoryError("secret"), 503, "serve a request: the device is out of memory. Ask again"),
        (BadOption("asked", "found", "Do."), 400, "asked: found. Do."),
    ],
)
def test_a_failure_ends_its_requests_and_no_others(error, status, said, monkeypatch):
    with service("snapkv") as s:
        wanted = Client(s, ids(40), greedy(5)).tokens()
        real, calls = s.model.forward, []

        def fails(*args, **kwargs):
            calls.append(1)
            if len(calls) in (1, 4):  # a prompt, then a step
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(s.model, "forward", fails)
        for _ in range(2):
            told = Client(s, ids(40), greedy(5)).all()[-1].error
            assert told.status == status and str(told).startswith(said) and "secret" not in str(told)
        assert Client(s, ids(40), greedy(5)).tokens() == wanted
        assert s.health()["ended"] == {"finished": 2, "cancelled": 0, "failed": 2}
        assert s.health()["memory"]["bytes_reserved"] == 0


@pytest.mark.parametrize("what", ["take_in", "keep_rows"])
def test_a_failure_while_rows_join_or_leave_ends_those_that_are_there(what, monkeypatch):
    with service() as s:
        monkeypatch.setattr(caches, what, lambda *_: 1 / 0)
        first, second = (Client(s, ids(40), greedy(count)) for count in (30, 5))
        assert any(told.error for told in [c.all()[-1] for c in (first, second)])
        monkeypatch.undo()
        until(lambda: s.health()["running"] == 0)
        assert Client(s, ids(40), greedy(5)).tokens()


def test_closing_tells_those_that_are_there_and_leaves_the_model_as_it_was():
    s = service("snapkv", batch=1)
    with s:
        running, waiting = (Client(s, ids(40), greedy(4000)) for _ in range(2))
        running.events.get(timeout=PATIENCE_SECONDS)
    for client in (running, waiting):
        assert client.all()[-1].error.status == 503
    assert refused(s, ids(3), GREEDY).status == 503 and s.health()["status"] == "closing"
    assert not hasattr(small.model(), "_saccade_run")


def test_what_does_not_work_as_elsewhere_is_said(monkeypatch):
    model = models.tiny("llama", layers=6)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.2)
    with service(READING_AGAIN, model) as s:
        together, own = s.notes()
    assert together.startswith("Each request is decoded by itself: tidaldecode reads tokens again")
    assert own == "The model's own generation settings repetition_penalty=1.2 are not applied."
    with service("minference") as s:
        said = ["Who is being answered waits while a prompt is read", "No prompt is reused"]
        assert [n.split(":")[0] for n in s.notes()] == said
