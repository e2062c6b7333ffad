"""The one place that seeds. Streams have names, so that adding a method does not reshuffle the data."""

from __future__ import annotations

import hashlib
import random

import torch


def seed_of(name: str, root: int = 0, *keys: object) -> int:
    """A 63-bit seed from a stream name, a root seed and any further keys; the same in every process."""
    text = "/".join([name, str(root), *map(str, keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(name: str, root: int = 0, *keys: object, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the named stream."""
    return torch.Generator(device=device).manual_seed(seed_of(name, root, *keys))


def python(name: str, root: int = 0, *keys: object) -> random.Random:
    """A standard-library generator for the named stream: choices of words, depths, orders."""
    return random.Random(seed_of(name, root, *keys))
