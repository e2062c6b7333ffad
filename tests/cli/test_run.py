"""run, explain and calibrate on a tiny model: the same as the library gives."""

from __future__ import annotations

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import saccade
from saccade.cli import main
from saccade.cli.stream import Stream
from saccade.core.artefact import Artefact
from tests.measure import small

PROMPT = "The whale swam past the ship, and nobody on the ship saw the whale at all."


class Bytes:
    """A tokenizer whose tokens are bytes: most letters come in pieces."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode(errors="replace")


@given(st.text(max_size=20))
def test_a_stream_writes_every_letter_once_and_whole(text):
    pieces = []
    stream = Stream(Bytes(), pieces.append)
    stream.start()
    stream.put(torch.tensor([[7, 7, 7]]))
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
    stream.end()
    assert "".join(pieces) == stream.text == text
    assert (stream.prompt_tokens, stream.new_tokens) == (3, len(text.encode()))
    assert "\ufffd" not in "".join(pieces).replace(text, "")


def expected(budget: float | str, tokens: int) -> tuple[str, float, int]:
    """Text, kept fraction and bytes by the library itself."""
    model, tokenizer = small.model(), small.tokenizer()
    with saccade.attach(model, "knorm", budget=budget) as run:
        inputs = tokenizer(PROMPT, return_tensors="pt")
        ids = model.generate(**{k: inputs[k] for k in ("input_ids", "attention_mask")}, max_new_tokens=tokens)
        record = run.record
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text, record.kept_fraction, record.bytes_held


@pytest.mark.parametrize("budget", ["0.3", "20tok"])
def test_the_text_and_the_figures_are_those_of_generate(budget, tiny, capsys):
    given = ["run", PROMPT, "--model", tiny, "--method", "knorm", "--budget", budget, "--new-tokens", "9"]
    given += ["--dtype", "float32"]
    text, kept, held = expected(budget, 9)
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert out == f"{text}\n" and err.startswith(f"knorm: {len(PROMPT)} + 9 tokens in ") and " KiB of " in err
    assert main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["kept_fraction"], found["bytes_held"]) == (text, kept, held)
    assert 0 < held < found["bytes_full"] and found["prompt_tokens"] == len(PROMPT) and found["new_tokens"] == 9


def test_full_attention_keeps_all(tiny, capsys):
    assert main(["run", "hello", "--model", tiny, "--new-tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_held"] == found["bytes_full"] and found["kept_fraction"] == 1.0 and found["budget"] == "1"


def test_a_file_goes_before_the_question_and_a_pipe_is_a_prompt(tiny, capsys, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("Call me Ishmael.\n")
    texts = []
    for arguments, typed in (
        (["-f", str(tmp_path / "text"), "Who?"], ""),
        (["-f", str(tmp_path / "text"), "-"], "Who?\n"),
        ([], "Call me Ishmael.\n\nWho?"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main(["run", *arguments, "--model", tiny, "--new-tokens", "5", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert len({t["text"] for t in texts}) == 1 and {t["prompt_tokens"] for t in texts} == {22}


def test_what_the_model_cannot_take_is_refused(tiny, capsys):
    assert main(["run", "a" * 5000, "--model", tiny]) == 2
    assert "BadInput: run 5,000 tokens and 128 new ones: " in capsys.readouterr().err
    assert main(["run", "a", "--model", tiny, "--device", "nowhere"]) == 2
    assert "BadOption: device 'nowhere'" in capsys.readouterr().err


def test_explain_answers_yes_with_zero_and_no_with_one(tiny, capsys, cache):
    assert main(["explain", tiny, "minference+snapkv"]) == 0
    assert capsys.readouterr().out.endswith("at budget 0.25; its part is prefill+cache.\n")
    assert main(["explain", "double-sparsity", "--model", tiny, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["runs"] and any("saccade calibrate double-sparsity" in reason for reason in found["reasons"])
    assert main(["explain", tiny, "minference", "--budget", "1GiB"]) == 1
    assert "cannot run" in (said := capsys.readouterr().out) and "\n  - it leaves out pairs, not memory" in said


def test_calibrate_makes_what_explain_asked_for(tiny, capsys, cache, tmp_path):
    (tmp_path / "text").write_text(PROMPT * 4)
    given = ["calibrate", "double-sparsity", "--model", tiny, "--samples", "2", "--tokens", "64"]
    assert main([*given, "--text", str(tmp_path / "text")]) == 0
    out, err = capsys.readouterr()
    made = Artefact.load(out.strip())
    assert out.startswith(str(cache)) and made.method == "double-sparsity" and "share of" in err
    assert main(["explain", "double-sparsity:dense_layers=0", "--model", tiny]) == 0
    assert main([*given[:-1], "500", "--text", str(tmp_path / "text")]) == 2
    assert "2 rows of 500 tokens from" in capsys.readouterr().err
    assert main(["calibrate", "snapkv", "--model", tiny]) == 3
    assert "CannotRun: calibrate snapkv: it has nothing to learn." in capsys.readouterr().err
