"""Evictions by the weights of every token: what cannot be taken back, and rows of a batch that get no token."""

from __future__ import annotations

import pytest
import torch

from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.core.errors import CannotRun
from saccade.methods.cache.h2o import H2O
from saccade.methods.cache.tova import TOVA
from tests.methods.handmade import in_pieces, tiny, tokens

METHODS = pytest.mark.parametrize("method", [TOVA(), H2O()], ids=["tova", "h2o"])
MODEL, N = tiny(), 24


@METHODS
def test_tokens_are_not_taken_back(method):
    name = method.card.name
    with attach(MODEL, method, budget=0.5), torch.no_grad():
        cache = MODEL(tokens(N), use_cache=True)[CACHE]
        cache.crop(0)
        with pytest.raises(CannotRun, match=rf"take tokens back under {name}: '{name}' has dropped keys by the"):
            cache.crop(-1)
        with pytest.raises(CannotRun, match=rf"assisted decoding with {name}"):
            cache.layers[0].activate_past_recording()


@METHODS
def test_a_row_that_gets_no_token_stays_as_it_is(method):
    """Two rows, of which the second is padding in one of the steps after the prompt."""
    ids = tokens(N + 3, rows=2)
    real = torch.ones_like(ids)
    real[1, N + 1] = 0
    place = real.cumsum(-1) - 1
    with attach(MODEL, method, budget="9tok"), torch.no_grad():
        together = MODEL(ids[:, :N], use_cache=True)
        cache, steps = together[CACHE], []
        for t in range(N, N + 3):
            options = {"attention_mask": real[:, : t + 1], "position_ids": place[:, t : t + 1], CACHE: cache}
            steps.append(MODEL(ids[:, t : t + 1], **options).logits)
        without = in_pieces(MODEL, torch.cat([ids[1:, : N + 1], ids[1:, N + 2 :]], 1), [N])
        whole = in_pieces(MODEL, ids[:1], [N])
    torch.testing.assert_close(torch.cat(steps, 1)[:1], whole[:, N:])
    torch.testing.assert_close(steps[2][1:], without[:, N + 1 :])
