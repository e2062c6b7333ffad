"""What is written of the machine says what matters and nothing of its owner."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from saccade.measure.environment import deciding, digest, environment
from tests.measure.validate import problems, schema


def test_environment_is_as_published():
    assert problems(environment(), schema("env")) == []


def test_environment_says_nothing_personal():
    text = json.dumps(environment()).lower()
    for secret in (socket.gethostname(), str(Path.home()), str(Path.cwd()), getpass.getuser()):
        assert secret.lower() not in text.replace('"', " ").split(), secret


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=5))
def test_digest_ignores_order_and_nothing_else(value):
    assert digest(value) == digest(dict(reversed(value.items())))
    assert digest(value) != digest({**value, "another field": 1})


def test_more_memory_is_no_other_machine():
    found = environment()
    assert deciding(found) == deciding({**found, "memory_bytes": 1})
    assert deciding(found) != deciding({**found, "threads": 99})
