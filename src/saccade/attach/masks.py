"""A mask that is not made until somebody looks at it: a dense one is a gibibyte at 32k tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saccade.attach import compat

_PASS = {"to", "contiguous", "detach", "clone", "bool"}
_META = {"__get__", "dim", "size", "numel", "__repr__"}


class LazyMask(Tensor):
    """Looks like a boolean mask [b 1 q k], holds the padding and the mask function; foreign code that computes with it
    gets the dense mask."""

    arguments: dict[str, Any]

    @staticmethod
    def make(
        batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **rest: Any
    ) -> LazyMask:
        """The function registered with transformers' mask interface; its parameter names are given from there."""
        mask = torch.empty(batch_size, 1, q_length, kv_length, dtype=torch.bool, device="meta").as_subclass(LazyMask)
        known = {k: v for k, v in rest.items() if k not in ("config", "dtype")}
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        mask.arguments = {**sizes, "attention_mask": attention_mask, **known}
        return mask

    def dense(self) -> Tensor | None:
        """The mask itself; None means plain causal."""
        return compat.dense_mask(**self.arguments)

    @property
    def plain(self) -> bool:
        """True if nothing but causality and padding is in it."""
        return compat.is_plain_causal(self.arguments["mask_function"])

    def real_tokens(self, queries: int) -> Bool[Tensor, "b q"] | None:
        """Which of the new tokens are real; None: all. Asked once per forward, the mask is shared by all layers."""
        if "_real" not in self.__dict__:
            padding = self.arguments["attention_mask"]
            new = None if padding is None else padding[:, -queries:].bool()
            self.__dict__["_real"] = None if new is None or bool(new.all()) else new
        return self.__dict__["_real"]

    def real_keys(self, keys: int) -> Bool[Tensor, "b k"] | None:
        """Which of all tokens are real, those read before among them; None: all."""
        padding = self.arguments["attention_mask"]
        real = None if padding is None else padding[:, :keys].bool()
        return None if real is None or bool(real.all()) else real

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _PASS:
            return args[0]
        if name in _META:
            return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

        def dense(x):
            return x.dense() if isinstance(x, LazyMask) else x

        return func(*map(dense, args), **{k: dense(v) for k, v in (kwargs or {}).items()})
