"""ZipVL: its two equations in plain loops, a dense pass over what it rounds, bytes, and a model that sees images."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach import attach, explain
from saccade.attach.compat import CACHE
from saccade.attach.listening import listening
from saccade.attach.probe import probe
from saccade.core.budget import Budget
from saccade.core.errors import BadOption, CannotRun, DoesNotCompose
from saccade.core.selection import causal_mask
from saccade.measure.bytes import full_cache_bytes
from saccade.methods.cache.zipvl import ZipVL
from saccade.ops.attend.reference import masked
from tests.attach.test_packing import Unequal
from tests.methods.handmade import in_pieces, noise, site, tiny, tokens
from tests.ops.test_packed import rounded

options = st.builds(
    ZipVL,
    mass_share=st.sampled_from([0.3, 0.7, 0.96, 1.0]),
    recent_probe_tokens=st.integers(1, 6),
    random_probe_tokens=st.integers(0, 6),
)
BUDGETS = st.sampled_from([1.0, 0.4, "3tok"])
SEES, SAYS = 40, 12  # tokens of the prompt with an image, and of the answer


def important(q, k, at, budget, share):
    """Equations 6 and 7 for one sequence, one probe row and one key after the other; `at` are the rows' own keys."""
    h, (g, n) = q.shape[0], k.shape[:2]
    mass, rows = [0.0] * n, [0] * n
    for row, place in enumerate(at):
        for head in range(h):
            logits = k[head // (h // g), : place + 1] @ q[head, row] / k.shape[-1] ** 0.5
            weights = logits.softmax(0)
            for j, weight in enumerate(weights.tolist()):
                mass[j] += weight / h
        for j in range(place + 1):
            rows[j] += 1
    count, held = 0, 0.0
    for most in sorted(mass, reverse=True):
        count, held = count + 1, held + most
        if share < 1 and held >= share * sum(mass):
            break
    count = min(count, Budget.of(budget).tokens(n))
    by_row = sorted(range(n - 1), key=lambda j: -mass[j] / rows[j])
    return sorted([n - 1, *by_row[: count - 1]])


def found(marks):
    return marks[0].nonzero()[:, 0].tolist()


@given(options, BUDGETS, st.integers(1, 30), st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_what_matters_is_what_the_equations_say(method, budget, queries, before):
    """The fewest that hold the share of the mass, the best of them by row, the newest always."""
    n = queries + before
    q, k = noise(1, 4, queries, 8, name="q").double(), noise(1, 2, n, 8, name="k").double()
    here = site(budget, queries=queries, keys=n)
    at = method._probes(here).tolist()
    recent = min(method.recent_probe_tokens, queries)
    assert at == sorted(set(at)) and at[-recent:] == list(range(n - recent, n)) and at[0] >= before
    assert len(at) == min(queries, recent + method.random_probe_tokens)
    asked = [q[0, :, i - before] for i in at]
    marks = method.mark(q, k, here)
    assert found(marks) == important(torch.stack(asked, 1), k[0], at, budget, method.mass_share)


def test_parts_of_a_prompt_add_up():
    """Each has probes of its own, and all of them say what matters in the end."""
    method = ZipVL(mass_share=0.8, recent_probe_tokens=4, random_probe_tokens=3)
    q, k = noise(1, 4, 30, 8, name="q").double(), noise(1, 2, 30, 8, name="k").double()
    state, rows = {}, []
    for first, last in ((0, 12), (12, 19), (19, 30)):
        here = site(queries=last - first, keys=last, state=state)
        rows += method._probes(here).tolist()
        marks = method.mark(q[:, :, first:last], k[:, :, :last], here)
        assert found(marks) == important(q[0][:, rows], k[0, :, :last], rows, 1.0, 0.8)


@given(options, BUDGETS, st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_the_newest_token_says_what_matters_in_its_unit(method, budget, n):
    q, k = noise(1, 4, 1, 8, name="q").double(), noise(1, 2, n, 8, name="k").double()
    marks = method.mark(q, k, site(budget, queries=1, keys=n, stage="decode", seen=50))
    assert found(marks) == important(q[0], k[0], [n - 1], budget, method.mass_share)


def test_nothing_is_said_of_a_query_that_is_not_a_number():
    q, k = noise(1, 4, 9, 8, name="q"), noise(1, 2, 9, 8, name="k")
    q[:, :, -1] = torch.nan
    assert found(ZipVL().mark(q, k, site(queries=9, keys=9))) == [8]


PROMPT, UNIT, SHARE = 40, 8, 0.7


class Oracle:
    """Dense attention of one layer under what the method says, one later token after the other."""

    run = SimpleNamespace(title="oracle")

    def __init__(self, method, spot):
        self.method, self.place = method, spot.place

    def _marks(self, q, k, at):
        return important(q[0][:, at], k[0], at, 1.0, SHARE)

    def forward(self, layer, q, k, v, real):
        n, prompt = k.shape[2], site(queries=PROMPT, keys=PROMPT, layer=self.place.layer)
        matter = self._marks(q, k[:, :, :PROMPT], self.method._probes(prompt).tolist())
        seen = torch.zeros(n, n, dtype=torch.bool)
        seen[:PROMPT, :PROMPT][torch.tensor(matter)[:, None], matter] = True
        if self.method.prompt == "dense":
            seen[:PROMPT, :PROMPT] = True
        seen[PROMPT:] = True
        if self.method.unimportant == "drop":
            seen[PROMPT:, [j for j in range(PROMPT) if j not in matter]] = False
        keys, values, out = k.clone(), v.clone(), []
        for i in range(n):
            if i >= PROMPT and (i - PROMPT) % UNIT == 0 and self.method.unimportant == "pack":
                first = max(0, i - UNIT) if i > PROMPT else 0
                if i > PROMPT:  # by the token before this one, over its unit alone
                    last = q[0, :, i - 1 : i]
                    matter = [first + j for j in important(last, k[0, :, first:i], [UNIT - 1], 1.0, SHARE)]
                self._round(keys, values, matter, [j for j in range(first, i) if j not in matter])
            out.append(masked(q[:, :, i : i + 1], keys, values, (seen & causal_mask(n, n))[i : i + 1],
                              scale=self.place.scale)[0])  # fmt: skip
        return torch.cat(out, 2)

    def _round(self, keys, values, *apart):
        for bits, some in zip((4, 2), apart):
            for head in range(keys.shape[1] if some else 0):
                keys[0, head, some], values[0, head, some] = rounded(keys[0, head, some], values[0, head, some], bits)


@pytest.mark.parametrize("unimportant", ["pack", "drop"])
@pytest.mark.parametrize("prompt", ["sparse", "dense"])
def test_a_model_computes_what_the_paper_says(unimportant, prompt):
    model, ids = tiny(), tokens(PROMPT + 21)
    method = ZipVL(mass_share=SHARE, unit_tokens=UNIT, recent_probe_tokens=6, random_probe_tokens=6, prompt=prompt,
                   unimportant=unimportant)  # fmt: skip
    with attach(model, method) as run:
        ours = in_pieces(model, ids, [PROMPT, PROMPT + 1, PROMPT + 7, PROMPT + 18])
    with listening(model, probe(model), functools.partial(Oracle, method)), torch.no_grad():
        expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(ours, expected)
    assert (run.record.kept_fraction < 1) == (unimportant == "drop")
    assert (run.record.density() < 0.9) == (prompt == "sparse")


def test_a_cache_in_16_bits_takes_three_tenths_at_most():
    """Codes, spans, scales, positions and the newest tokens, as storages."""
    model = models.tiny("llama", head_size=64).to(torch.bfloat16)
    ids, whole = tokens(560), full_cache_bytes(model, 560)
    with attach(model, ZipVL()) as run, torch.no_grad():
        cache = model(ids[:, :450], use_cache=True)[CACHE]
        for part in ids[:, 450:].split(55, 1):
            model(part, **{CACHE: cache})
    rows = [rows for layer in cache.layers for rows in layer.store.buckets]
    assert {(x.length, x.front) for x in rows} == {(560, 550)} and not any(layer.states for layer in cache.layers)
    assert run.record.bytes_held == sum(t.nbytes for x in rows for t in x.tensors())
    assert run.record.bytes_held <= 0.3 * whole and run.record.kept_fraction == 1
    assert all(x.packed["4 tokens"].shape[1] == 2 for x in rows)


def test_what_another_eviction_leaves_is_packed():
    model, ids = tiny(), tokens(90)
    method = ZipVL(unit_tokens=8, mass_share=0.8, prompt="dense")
    with attach(model, ["snapkv", method], budget=0.5) as run:
        at_once = in_pieces(model, ids, [60])
        torch.testing.assert_close(in_pieces(model, ids, [60, *range(61, 90)]), at_once)
    assert all(layer.kept[0][0].shape == (60,) for layer in run.record.layers.values())
    with attach(model, [Unequal(), method]), torch.no_grad():
        cache = model(ids[:, :60], use_cache=True)[CACHE]
        model(ids[:, 60:66], **{CACHE: cache})
        with pytest.raises(DoesNotCompose, match=r"'zipvl' reads all heads of a sequence together, and the eviction"):
            model(ids[:, 66:70], **{CACHE: cache})


def test_a_conversation_goes_on_in_the_same_cache():
    """The second turn is read after the first: as many tokens as come, in whichever pieces."""
    model, method = tiny(), ZipVL(unit_tokens=8, mass_share=0.8)
    first, told = tokens(40), {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    with attach(model, method) as run, torch.no_grad():
        cache = run.new_cache()
        said = model.generate(first, **{CACHE: cache}, **told)
        more = torch.cat([said, tokens(21)], 1)
        turn = model.generate(more, **{CACHE: cache}, **told)
        logits = in_pieces(model, turn, [40])
    wanted = logits[0, more.shape[1] - 1 : -1].index_fill(1, torch.tensor([2]), -torch.inf).argmax(-1)
    assert torch.equal(turn[0, more.shape[1] :], wanted)


@functools.cache
def seeing():
    """A LLaVA in float64, two prompts around an image of 36 tokens, and two images."""
    model = models.tiny_llava().double()
    ids = tokens(SEES, 2)
    ids[:, 2:38] = model.config.image_token_id
    return model, ids, noise(2, 3, 48, 48, name="images").double()


SAID = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("unimportant", ["pack", "drop"])
def test_a_model_that_sees_generates(how, unimportant):
    """Two rows with images and padding on the left say what each says alone, from a cache that is smaller."""
    model, ids, images = seeing()
    method = ZipVL(unit_tokens=5, mass_share=0.8, unimportant=unimportant)
    told = {"max_new_tokens": SAYS, "min_new_tokens": SAYS, **SAID[how]}
    short, mask = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids[1:, :-2]], 1), torch.ones_like(ids)
    mask[1, :2] = 0
    both, whole = torch.cat([ids[:1], short]), full_cache_bytes(model.model.language_model, SEES + SAYS)
    with attach(model, method) as run:
        torch.manual_seed(0)
        together = model.generate(input_ids=both, attention_mask=mask, pixel_values=images, **told)
        assert run.record.bytes_held < 0.8 * whole * len(run.record.layer(0).seen)
        assert 0 < run.record.density() < 0.8
        if how == "sampled":
            assert together.shape == (4, SEES + SAYS)
            return
        alone = [model.generate(input_ids=x, pixel_values=images[i : i + 1], **told)
                 for i, x in enumerate((ids[:1], ids[1:, :-2]))]  # fmt: skip
    assert torch.equal(together[0], alone[0][0]) and torch.equal(together[1, 2:], alone[1][0])


def test_what_it_sees_matters():
    """It is attached to the part that has the image among its tokens: another image, another cache."""
    model, ids, images = seeing()
    held = []
    for image in images:
        with attach(model, ZipVL(mass_share=0.8, unimportant="drop")) as run, torch.no_grad():
            model(input_ids=ids[:1], pixel_values=image[None])
            held.append([layer.kept[0][0].tolist() for layer in run.record.layers.values()])
    assert held[0] != held[1] and all(SEES - 1 in layer for layer in held[0] + held[1])


@pytest.mark.parametrize("see", [False, True])
def test_a_prompt_in_chunks_is_read_by_generate(see):
    """Each chunk attends among what matters so far; what was packed is the prompt, once, at its end."""
    model, ids, images = seeing() if see else (tiny(), tokens(SEES), None)
    given_ = {"input_ids": ids[:1]} | ({"pixel_values": images[:1]} if see else {})
    told = {"max_new_tokens": SAYS, "min_new_tokens": SAYS, "do_sample": False, "prefill_chunk_size": 11}
    with attach(model, ZipVL(mass_share=0.8, unit_tokens=3)) as run, mock.patch.object(
        ZipVL, "pack_apart", autospec=True, side_effect=ZipVL.pack_apart
    ) as packed:
        words = model.generate(**given_, **told)
    units = [call.args[1][0].shape[1] + call.args[2][0].shape[1] for call in packed.call_args_list]
    assert sorted(units, reverse=True) == [SEES, SEES, *[3] * (len(units) - 2)]
    assert words.shape == (1, SEES + SAYS) and run.record.layer(0).seen == [SEES + SAYS - 1]
    assert run.record.kept_fraction == 1 and run.record.density() < 0.8


@pytest.mark.parametrize("prompt", ["sparse", "dense"])
def test_assisted_decoding_is_refused(prompt):
    model, ids = tiny(), tokens(30)
    said = "assisted decoding with zipvl: guessed tokens are verified together with the prompt"
    with attach(model, ZipVL(prompt=prompt)), pytest.raises(CannotRun, match=said):
        model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=4, do_sample=False)


def test_options_that_cannot_be_used_say_why():
    for wrong in (0.0, 1.5):
        with pytest.raises(BadOption, match=rf"zipvl\.mass_share={wrong}: the tokens that matter hold more than 0 of"):
            ZipVL(mass_share=wrong)
    with pytest.raises(BadOption, match=r"zipvl\.recent_probe_tokens=0: the last row sees all\. Leave it away for 64"):
        ZipVL(recent_probe_tokens=0)
    with pytest.raises(BadOption, match=r"zipvl\.unit_tokens=0: a unit has one token or more"):
        ZipVL(unit_tokens=0)
    here = dataclasses.replace(site(queries=1, keys=1), head_size=6)
    assert ZipVL().check(here) == ["4 channels share a byte, and a head has 6"]
    assert ZipVL(unimportant="drop").check(here) == []
    said = "it packs all tokens, and the budget 1048576B is in bytes; give a fraction or tokens"
    assert explain(tiny(), "zipvl", budget="1MiB") == [said]


@pytest.mark.slow
def test_on_the_real_model_with_eyes():
    """SmolLM2 as the language part: what was packed of image and text is a fourth, and it goes on speaking."""
    language, tokenizer = models.load("smollm2")
    model = models.tiny_llava(language)
    text = tokenizer("Whales are large animals that live in the sea. " * 30)["input_ids"]
    ids = torch.tensor([[model.config.image_token_id] * 36 + text])
    with attach(model, "zipvl") as run:
        out = model.generate(input_ids=ids, pixel_values=noise(1, 3, 48, 48), max_new_tokens=12, do_sample=False)
    shares = [layer.density() ** 0.5 for layer in run.record.layers.values()]
    assert "animals that live in the sea" in tokenizer.decode(out[0, ids.shape[1] :])
    assert run.record.bytes_held <= 0.3 * full_cache_bytes(language, out.shape[1] - 1)
    assert min(shares) < 0.5 < max(shares)
