"""Named streams: the same in every process, different by name, seed and key, independent of each other."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core import rng
from tests import processes

NAMES, SEEDS = st.text("abc-", min_size=1, max_size=6), st.integers(0, 2**40)


@given(NAMES, SEEDS, st.lists(st.integers(0, 9), max_size=3))
def test_the_same_stream_gives_the_same(name, seed, keys):
    a, b = (torch.rand(4, generator=rng.generator(name, seed, *keys)) for _ in range(2))
    assert torch.equal(a, b)
    assert rng.python(name, seed, *keys).random() == rng.python(name, seed, *keys).random()
    assert 0 <= rng.seed_of(name, seed, *keys) < 2**63


@given(NAMES, SEEDS, st.integers(0, 9))
def test_another_name_seed_or_key_gives_another(name, seed, key):
    seeds = [rng.seed_of(name, seed), rng.seed_of(name + "x", seed), rng.seed_of(name, seed + 1)]
    seeds += [rng.seed_of(name, seed, key), rng.seed_of(name, seed, key + 1)]
    assert len(set(seeds)) == len(seeds)


def test_drawing_from_one_stream_moves_no_other_nor_torchs_own():
    before, expected = torch.get_rng_state(), torch.rand(3, generator=rng.generator("b"))
    second = rng.generator("b")
    torch.rand(100, generator=rng.generator("a"))
    assert torch.equal(torch.rand(3, generator=second), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_process_draws_the_same():
    code = "from saccade.core import rng; print(rng.seed_of('data', 7, 'x', 3), rng.python('data', 7).random())"
    said = processes.run("builtins:exec", code)[1].split()
    assert said == [str(rng.seed_of("data", 7, "x", 3)), str(rng.python("data", 7).random())]
