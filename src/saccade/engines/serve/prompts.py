"""Prompts read into caches by the model, with the methods that are attached."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch

from saccade.attach import compat
from saccade.attach.compat import CACHE
from saccade.engines.serve.jobs import Job


class Reading:
    """A prompt on its way into a cache, which holds `known` of its tokens, `read` of them for this request; None before
    it is begun."""

    def __init__(self, job: Job):
        self.job, self.known, self.read = job, 0, 0
        self.cache: Any = None

    @property
    def left(self) -> int:
        """Tokens to be read."""
        return len(self.job.ids) - self.known


class Prompts:
    """How they are read. `run`: of what is attached; None: nothing is."""

    def __init__(self, model: Any, run: Any):
        self.model, self.run = model, run
        self._forward = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def new_cache(self) -> Any:
        """An empty one."""
        return self.run.new_cache() if self.run else compat.new_cache(self.model)

    def one(self, ends: bool = True, tokens: int = 0) -> contextlib.AbstractContextManager[Any]:
        """Inside, what is read is one prompt, in however many forwards; it ends on leaving, or goes on elsewhere up to
        so many tokens."""
        return self.run.prompt(ends=ends, tokens=[tokens] if tokens else ()) if self.run else contextlib.nullcontext()

    def read(self, ids: list[int], cache: Any, known: int = 0) -> torch.Tensor:
        """Logits [1 n v] of the tokens that the cache does not hold yet; of the last alone if the model can do that."""
        device = self.model.device
        places = torch.arange(known, len(ids), device=device)[None]
        mask = torch.ones(1, len(ids), dtype=torch.long, device=device)
        new = torch.tensor([ids[known:]], device=device)
        given = {CACHE: cache, "use_cache": True, **self._forward}
        return self.model(new, attention_mask=mask, position_ids=places, **given).logits
