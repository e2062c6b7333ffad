"""Sites made by hand, and a whole model under a mask: what the tests of methods check against."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from saccade import models
from saccade.attach import attach
from saccade.attach.compat import CACHE
from saccade.attach.listening import listening
from saccade.attach.probe import probe
from saccade.core import rng
from saccade.core.budget import Budget
from saccade.core.selection import causal_mask
from saccade.core.site import Site
from saccade.ops.attend.reference import masked


def site(budget: float | str = 1.0, *, queries: int, keys: int, **changes) -> Site:
    """A site of two layers, four heads over two, of size eight."""
    shape = dict(layer=0, layers=2, heads=4, kv_heads=2, head_size=8, scale=8**-0.5, stage="prefill", seen=keys)
    return Site(**{**shape, **changes}, queries=queries, keys=keys, budget=Budget.of(budget))


def noise(*shape: int, name: str = "noise") -> Tensor:
    """The same normal numbers for the same shape and name."""
    return torch.randn(*shape, generator=rng.generator(name, 0, *shape))


def tiny(layers: int = 2):
    """A tiny Llama in float64: rounding then hides no mistake, and torch's default tolerance for it is tight."""
    return models.tiny("llama", layers=layers).double()


def tokens(n: int, rows: int = 1) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, models.families.VOCAB, (rows, n), generator=rng.generator("tokens", 0, n, rows))


def under_mask(model, ids: Tensor, mask: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """Logits of one dense pass in which layer l attends under mask(l, q, k), [b h n n], and causally."""

    class Masked:
        run = SimpleNamespace(title="oracle")

        def __init__(self, spot):
            self.place = spot.place

        def forward(self, layer, q, k, v, real):
            allowed = mask(self.place.layer, q, k) & causal_mask(q.shape[2], k.shape[2])
            return masked(q, k, v, allowed, scale=self.place.scale)[0]

    with listening(model, probe(model), Masked), torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_under_its_mask(method, budget: float = 0.3) -> None:
    """A method of the prefill, attached: what comes out is dense attention under the mask of what it selects."""
    model, ids, n = tiny(), tokens(90), 90
    with attach(model, method, budget=budget) as run, torch.no_grad():
        found = model(ids).logits
    assert budget - 0.1 < run.record.density() <= budget

    def mask(layer, q, k):
        here = site(budget, queries=n, keys=n, layer=layer, scale=q.shape[-1] ** -0.5)
        return method.select(q, k, here).mask().expand(1, 4, n, n)

    torch.testing.assert_close(found, under_mask(model, ids, mask))


def in_pieces(model, ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits of the same cache fed piece by piece; cuts are where pieces end."""
    with torch.no_grad():
        first = model(ids[:, : cuts[0]], use_cache=True)
        out, cache = [first.logits], first[CACHE]
        for start, end in zip(cuts, [*cuts[1:], ids.shape[1]]):
            out.append(model(ids[:, start:end], **{CACHE: cache}, use_cache=True).logits)
    return torch.cat(out, 1)
