"""plan: a row for every way and phase, the same as JSON, and what is not reckoned is refused."""

from __future__ import annotations

import json

import pytest

from saccade.cli import main
from saccade.cli.plan import context
from saccade.measure.scale import WAYS, phases


def test_a_row_for_every_way_and_phase_and_the_same_as_json(capsys):
    given = ["plan", "--model", "Llama-3-70B", "--context", "1M", "--gpus", "2"]
    assert main(given) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + sum(len(phases(way)) for way in WAYS)
    full, snapkv = (next(x for x in out.splitlines() if x.startswith(n) and "decode" in x) for n in ("full", "snapkv"))
    assert "does not fit" in full and "only this fits" in snapkv
    assert "llama-3-70b, one text of 1,048,576 tokens" in err and err.endswith("Reckoned, not measured.\n")
    assert main([*given, "--network", "25", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["context"] == 2**20 and found["network_bytes_per_second"] == 25e9 and len(found["rows"]) > len(WAYS)
    assert found["dense"]["cache_bytes"] == 80 * 2**20 * 4096


def test_contexts_are_read_as_people_write_them():
    assert [context(text) for text in ("131072", "128k", "1M", "0.5m")] == [2**17, 2**17, 2**20, 2**19]


@pytest.mark.parametrize(
    "given, words",
    [
        (["--context", "long"], "--context long: it is no number of tokens"),
        (["--context", "inf"], "--context inf: it is no number of tokens"),
        (["--context", "1000M"], "1,048,576,000 tokens are not reckoned: measured points end at 512k"),
        (["--gpus", "0"], "--gpus 0: so many are not reckoned. Give 1 to 1,024"),
        (["--link", "0"], "--link 0: nothing moves at that speed"),
        (["--model", "gpt-9"], "no model shape 'gpt-9'"),
    ],
    ids=" ".join,
)
def test_what_is_not_reckoned_is_refused(given, words, capsys):
    assert main(["plan", *given]) == 2
    assert words in capsys.readouterr().err
