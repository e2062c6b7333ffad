"""The keys with the largest inner product with a query, by an index that need not look at all of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saccade.core.errors import BadInput, BadOption, CannotRun

KINDS = ("graph", "graph-faiss", "flat", "hnsw", "ivf")
LIBRARY = ("graph-faiss", "hnsw", "ivf")  # by faiss, which is found, never required


class Found(NamedTuple):
    """Best first; -1 and -inf where fewer were found. visited: products of a query and a key (of "ivf" those with the
    clusters' centres are not counted), over all queries; still on the device that counted them, where one did.
    """

    index: Int[Tensor, "g s k"]
    score: Float[Tensor, "g s k"]
    visited: int | Int[Tensor, ""]


class Nearest(Protocol):
    """An index over keys [g n d], for each head alone. It is not changed by searching."""

    @property
    def keys(self) -> Float[Tensor, "g n d"]:
        """What it finds."""
        ...

    def search(self, q: Float[Tensor, "g s d"], count: int) -> Found:
        """The `count` keys of the largest q.k, as far as the index finds them; all keys, where there are no more.

        What is found is put where q lies, wherever the index does.
        """
        ...

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        ...

    def moved(self, move: Callable[[Tensor], Tensor]) -> Nearest:
        """The same with each of its tensors, the keys among them, where `move` puts it."""
        ...


@torch.no_grad()
def index_keys(
    keys: Float[Tensor, "g n d"],
    queries: Float[Tensor, "g m d"],
    kind: str = "graph",
    *,
    beam: int = 128,
    probes: int = 32,
    degree: int = 35,
) -> Nearest:
    """An index over these keys.

    "flat": none, every key is looked at: the oracle. "graph": keys that the same queries want are neighbours, so that
    a search goes where queries go; built where the keys lie. Queries on a CUDA device are searched for there, by a
    kernel that reads an index in pinned host memory where it lies, with beams up to 1,024 keys; others by plain torch
    where the index lies. "graph-faiss": the same graph, searched by faiss on the CPU. "hnsw", "ivf": a graph of near
    keys, and clusters of keys, both by faiss on the CPU, and blind to the queries.

    beam: of "graph" and "hnsw": the best keys so far that a search holds, at least as many as are asked for
    probes: of "ivf": clusters that a search looks into
    degree: of "graph" and "hnsw": neighbours of a key

    Raises:
        BadInput: keys and queries that do not fit together, or none.
        BadOption: an unknown kind, or a number below 1.
        CannotRun: the kind needs a library that is not installed.
    """
    _check(keys, queries)
    if kind not in KINDS:
        raise BadOption(f"index keys with kind={kind!r}", "there is no such index", f"Take one of: {', '.join(KINDS)}.")
    for name, value in {"beam": beam, "probes": probes, "degree": degree}.items():
        if value < 1:
            raise BadOption(f"index keys with {name}={value}", "it takes at least 1", "Give such a number.")
    if kind == "flat":
        from saccade.ops.nearest.reference import Flat

        return Flat(keys)
    if reasons := index_reasons(kind):
        raise CannotRun(f"index keys with kind={kind!r}", reasons, "Or take 'graph' or 'flat'.")
    if kind in ("hnsw", "ivf"):
        from saccade.ops.nearest import library

        return library.build(keys, kind, beam, probes, degree)
    from saccade.ops.nearest import graph

    made = graph.build(keys, queries, beam, degree)
    if kind == "graph":
        return made
    from saccade.ops.nearest import library

    return library.followed(made)


def index_reasons(kind: str) -> list[str]:
    """Why an index of this kind cannot be had here; [] if it can."""
    if kind not in LIBRARY or importlib.util.find_spec("faiss") is not None:
        return []
    return [f"index={kind!r} needs faiss, which is not installed: pip install 'saccade[retrieval]'"]


def _check(keys: Tensor, queries: Tensor) -> None:
    shapes = f"index keys {tuple(keys.shape)} for queries {tuple(queries.shape)}"
    if keys.dim() != 3 or queries.dim() != 3 or keys.shape[::2] != queries.shape[::2]:
        raise BadInput(shapes, "they are not [heads, any, size] of the same heads and size", "Give a row per key head.")
    if not keys.shape[1] or not queries.shape[1]:
        raise BadInput(shapes, "there is nothing to index", "Give one key and one query or more.")
