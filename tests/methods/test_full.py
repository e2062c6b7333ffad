"""The baseline changes nothing."""

from __future__ import annotations

import torch

from saccade.attach import attach
from tests.methods.handmade import in_pieces, tiny, tokens


def test_logits_and_record_are_those_of_the_model_alone():
    model, ids = tiny(), tokens(40, rows=2)
    alone = in_pieces(model, ids, [30, 31])
    with attach(model, "full", budget=0.25) as run:
        torch.testing.assert_close(in_pieces(model, ids, [30, 31]), alone)
    assert run.record.density("prefill") == run.record.density("decode") == run.record.kept_fraction == 1.0
