"""One number hidden in a long text; the question comes when the text is already compressed."""

from __future__ import annotations

from saccade.tasks.passkey import Passkey


class PasskeyAgnostic(Passkey):
    """The pass key of `passkey`, same keys and places, asked for after the context was compressed."""

    name = "passkey-agnostic"
    title = "pass key, question after compression (query-agnostic)"
    metric = "hit"
    query_aware = False
    chance = 1.1e-5
    spread = 0.2
