"""What a method says of itself. Tables, pages, errors and the skips of the conformance suite all come from here.

Torch-free: the registry reads cards from the source text, so that `saccade list` need not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FAMILIES = ("sparse", "cache", "decode", "tokens", "steer", "neurons", "mixers", "nets", "probes")

# the properties of DESIGN section 4, in its order: a card excuses one only with a reason
PROPERTIES = (
    "full-budget",  # 1  full budget equals dense
    "mask",  # 2  output equals dense under selection.mask()
    "budget",  # 3  achieved within requested; short contexts work
    "padding",  # 4  padding changes nothing on real tokens
    "batch",  # 5  a row depends on no neighbour and no earlier sample
    "chunks",  # 6  prefill in chunks = at once; prefill + steps = one pass
    "gqa",  # 7  grouped heads = repeated heads
    "cache-ops",  # 8  beam reorder, crop and batch select commute
    "detach",  # 9  detach restores bit for bit
    "causality",  # 10 nothing before t depends on t
    "forms",  # 11 mixers: all forms agree, gradients too
    "memory",  # 12 NaN-poisoned memory, strided inputs, dtype kept
    "errors",  # 13 every documented error raised with its text
    "bytes",  # 14 bytes reported = bytes held
    "seed",  # 15 same seed, same selection
)


@dataclass(frozen=True)
class Card:
    """One method, as data. Written as a literal: `card = Card(name="snapkv", ...)`.

    `lacks` maps a property of the conformance suite, or "keys", "assisted", "compile", "backward", to the reason why
    the method does not have it. What is not in `lacks` is claimed, and what is claimed is tested.
    """

    name: str
    title: str
    family: str
    paper: str  # "arXiv:2404.14469", or "" for a baseline
    year: int
    summary: str  # one sentence
    equation: str = ""
    authors: str = ""
    official: str = ""  # "owner/repository", of the authors
    licence_of_official: str = ""
    budget: str = ""  # what a budget means for this method
    takes_budget: bool = True  # False: what it saves follows from its options; a budget is for what is beside it
    needs: tuple[str, ...] = ()  # "queries", "attention": what its score must be given
    calibrated: bool = False  # has a calibrate() whose artefact it uses
    baseline: bool = False  # always in a comparison, proves nothing by itself
    usual: bool = False  # in a comparison for which no method is named; such a one takes minutes
    departures: tuple[str, ...] = ()  # where we differ from paper or official code, and why
    lacks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        assert self.family in FAMILIES, f"{self.name}: family {self.family!r}"
        assert all(self.lacks.values()), f"{self.name}: a missing property needs a reason"

    @property
    def link(self) -> str:
        """Where the paper is."""
        return f"https://arxiv.org/abs/{self.paper.removeprefix('arXiv:')}" if self.paper.startswith("arXiv:") else ""
