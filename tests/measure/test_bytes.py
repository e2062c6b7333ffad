"""Bytes are those of the storages: of a real cache, of sliding layers, of a cache under methods."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade import models
from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.measure.bytes import cache_bytes, full_cache_bytes


@pytest.mark.parametrize("family, window", [("llama", None), ("qwen3", 8), ("gemma3", 8), ("gpt-neox", None)])
@settings(max_examples=8, deadline=None)
@given(tokens=st.integers(1, 40), rows=st.integers(1, 3))
def test_a_full_cache_counted_without_a_forward_equals_one_with(family, window, tokens, rows):
    net = models.tiny(family, window=window)
    with torch.no_grad():
        cache = net(torch.ones(rows, tokens, dtype=torch.long), use_cache=True)[CACHE]
    assert cache_bytes(cache) == full_cache_bytes(net, tokens, rows)


def test_bytes_of_full_are_two_tensors_per_layer():
    net = models.tiny("llama", layers=3, kv_heads=2, head_size=16)
    assert full_cache_bytes(net, 100) == 3 * 2 * 2 * 100 * 16 * 4


def test_a_cache_under_a_method_holds_what_was_kept():
    net, ids = models.tiny("llama"), torch.arange(3, 103)[None]
    with torch.no_grad(), attach(net, "knorm", budget=0.25) as run:
        cache = net(ids, use_cache=True)[CACHE]
        assert cache_bytes(cache) == run.record.bytes_held
    share = cache_bytes(cache) / full_cache_bytes(net, 100)
    assert 0.25 <= share < 0.35, "a quarter of the keys and values, and their positions"


def test_an_empty_cache_holds_nothing():
    net = models.tiny("llama")
    with torch.no_grad():
        cache = net(torch.ones(1, 1, dtype=torch.long), use_cache=True)[CACHE]
    cache.reset()
    assert cache_bytes(type(cache)(config=net.config)) == 0
