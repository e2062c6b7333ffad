"""How much a method may use, as asked, and as achieved."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from saccade.core.errors import BadBudget

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_FORMS = "a fraction kept (0.25 or '25%'), tokens per head ('4096tok') or bytes ('2GiB')"


@dataclass(frozen=True)
class Budget:
    """What may be kept: a fraction of the tokens, a number of tokens per head, or bytes of the whole cache.

    A ratio is always the fraction *kept*. For methods that choose pairs, it is the fraction of the causal
    (query, key) pairs that are computed.

    Raises:
        BadBudget: zero or below, a fraction above one, or an unknown unit.
    """

    amount: float
    unit: Literal["fraction", "tokens", "bytes"] = "fraction"

    def __post_init__(self):
        if not isinstance(self.amount, (int, float)) or not math.isfinite(self.amount) or self.amount <= 0:
            raise BadBudget(f"budget={self.amount!r}", "it keeps nothing", f"Give {_FORMS}.")
        if self.unit == "fraction" and self.amount > 1:
            raise BadBudget(
                f"budget={self.amount!r}",
                "a fraction kept cannot exceed 1",
                f"For a number of tokens write '{self.amount:g}tok'.",
            )
        if self.unit != "fraction" and self.amount < 1:
            raise BadBudget(f"budget={self.amount!r} {self.unit}", "it keeps nothing", f"Give {_FORMS}.")

    @classmethod
    def of(cls, value: float | str | Budget) -> Budget:
        """Read 0.25, '25%', '4096tok', '2GiB' or a Budget."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls(float(value))
        found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(%|tok|tokens|[KMG]i?B|B)?\s*", str(value))
        try:
            number = float(found[1]) if found else math.nan
        except ValueError:
            number = math.nan
        if found is None or math.isnan(number):
            raise BadBudget(f"budget={value!r}", "it is no budget", f"Give {_FORMS}.")
        unit = found[2]
        if unit is None:
            return cls(number)
        if unit == "%":
            return cls(number / 100)
        if unit.startswith("tok"):
            return cls(number, "tokens")
        return cls(number * _UNITS[unit], "bytes")

    def tokens(self, n: int, bytes_per_token: int = 0) -> int:
        """Tokens per head that may be kept out of `n`: at least one, at most `n`.

        `bytes_per_token`: what one token costs in every head of every layer; needed for a budget in bytes.
        """
        if self.unit == "fraction":
            kept = math.floor(self.amount * n + 1e-9)
        elif self.unit == "tokens":
            kept = int(self.amount)
        elif bytes_per_token > 0:
            kept = int(self.amount) // bytes_per_token
        else:
            raise BadBudget(f"budget={self}", "the size of one token is not known here", "Give a fraction or tokens.")
        return max(1, min(n, kept))

    def fraction(self, n: int, bytes_per_token: int = 0) -> float:
        """The same, as a fraction of `n` tokens."""
        if self.unit == "fraction":
            return self.amount
        return self.tokens(n, bytes_per_token) / max(n, 1)

    def layer_tokens(self, n: int, layer: int, layers: int, dense_layers: int, bytes_per_token: int = 0) -> int:
        """Tokens per head in one layer, where the first `dense_layers` keep all `n` and the others pay for it.

        So few tokens that a fraction of them cannot pay are shared out evenly.

        Raises:
            BadBudget: a budget in tokens or bytes that the dense layers alone exceed.
        """
        even = self.tokens(n, bytes_per_token)
        left, others = even * layers - n * dense_layers, layers - dense_layers
        if even == n or dense_layers == 0 or (self.unit == "fraction" and left < others):
            return even
        if left < others:
            raise BadBudget(
                f"budget={self} with dense_layers={dense_layers}",
                f"{n} tokens in {dense_layers} of {layers} layers leave less than one token for each of the others",
                "Give a larger budget or fewer dense layers.",
            )
        return n if layer < dense_layers else left // others

    def unpaid(self, layers: int, dense_layers: int) -> list[str]:
        """Why a fraction cannot pay for the first `dense_layers` being dense; [] if it can."""
        if self.unit != "fraction" or self.amount == 1 or self.amount * layers > dense_layers or dense_layers == 0:
            return []
        return [f"dense_layers={dense_layers} of {layers} layers alone exceed budget={self}; change one of the two"]

    def row_tokens(self, n: int) -> int:
        """Keys per query row so that a causal pass over `n` tokens computes at most the budget's share of the pairs.

        Rows with fewer keys than that compute all of theirs: w keys a row make w n - w (w - 1) / 2 pairs of
        n (n + 1) / 2. For a budget in tokens it is that number.
        """
        if self.unit != "fraction":
            return self.tokens(n)
        pairs = self.amount * n * (n + 1) / 2
        # the smaller root of w^2/2 - (n + 1/2) w + pairs = 0
        root = (n + 0.5) - math.sqrt(max(0.0, (n + 0.5) ** 2 - 2 * pairs))
        return max(1, min(n, math.floor(root + 1e-9)))

    def __str__(self) -> str:
        if self.unit == "fraction":
            return f"{self.amount:.4g}"
        if self.unit == "tokens":
            return f"{int(self.amount)}tok"
        return f"{int(self.amount)}B"


FULL = Budget(1.0)
