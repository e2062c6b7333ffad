"""what is here and what is missing: versions, devices, cache, models, optional peers; safe to paste"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from saccade import __version__, models
from saccade.cli.console import say_json, say_table
from saccade.cli.options import add_json
from saccade.core.paths import cache_dir

EXAMPLE = "saccade doctor --json"
KERNELS = ("triton", "flash-attn", "flash-attn-4", "flashinfer-python", "natten", "flash-linear-attention", "kernels")
PEERS = (*KERNELS, "vllm", "ray", "lm-eval")
Finding = tuple[str, str, str]  # ok, warn, fail or -; what; found


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `doctor` takes."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """3 where something that is needed is missing."""
    found = [*_packages(), *_devices(), *_cache(), *_models(), *_peers()]
    if args.json:
        say_json([dict(zip(("state", "what", "found"), finding)) for finding in found])
    else:
        say_table(("state", "what", "found"), found)
    return 3 if any(state == "fail" for state, _, _ in found) else 0


def _packages() -> Iterator[Finding]:
    yield "ok", "saccade", __version__
    yield "ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    try:
        wanted = requires("saccade") or []
    except PackageNotFoundError:
        yield "warn", "requirements", "saccade runs from its source tree and is not installed: pip install -e ."
        wanted = ["torch", "transformers"]
    yield from (_package(text) for text in wanted if ";" not in text)
    yield _transformers()


def _package(text: str) -> Finding:
    from packaging.requirements import Requirement

    wanted = Requirement(text)
    try:
        here = version(wanted.name)
    except PackageNotFoundError:
        return "fail", wanted.name, f"missing; needed: {text}"
    good = wanted.specifier.contains(here, prereleases=True)
    return ("ok" if good else "fail"), wanted.name, f"{here} (needed: {wanted.specifier or 'any'})"


def _transformers() -> Finding:
    from packaging.version import Version

    from saccade.attach import compat

    here = Version(version("transformers"))
    tested = f"tested with {compat.OLDEST} to {compat.NEWEST_TESTED.major}.{compat.NEWEST_TESTED.minor}"
    state = "fail" if here < compat.OLDEST else "warn" if here > compat.NEWEST_TESTED else "ok"
    return state, "transformers, attached to", f"{here}, {tested}"


def _devices() -> Iterator[Finding]:
    import torch

    from saccade.measure.environment import cpu_name, memory_bytes, usual_dtype

    memory = memory_bytes()
    room = f", {memory / 2**30:.0f} GiB" if memory else ""
    yield "ok", "cpu", f"{cpu_name()}, {torch.get_num_threads()} threads{room}, {usual_dtype('cpu')} by default"
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch is built for CUDA {built}, but sees no device" if built else "torch is a CPU build"
        yield "-", "gpu", f"none: {why}"
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        room = f"{seen.total_memory / 2**30:.0f} GiB"
        yield "ok", f"cuda:{i}", f"{seen.name}, {room}, capability {seen.major}.{seen.minor}"


def _cache() -> Iterator[Finding]:
    folder = cache_dir()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = f"{shutil.disk_usage(there).free / 2**30:.0f} GiB free"
    shown = str(folder).replace(str(Path.home()), "~")
    if not os.access(there, os.W_OK):
        yield "warn", "cache", f"{shown} cannot be written to; set SACCADE_CACHE to a folder that can"
    else:
        used = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        yield "ok", "cache", f"{shown}, {used / 2**20:.0f} MiB, {free}"
    made = sorted(f.parent.name for f in folder.glob("artefacts/*/*.json"))
    yield "-", "artefacts of your own", ", ".join(made) or "none"


def _models() -> Iterator[Finding]:
    for known in models.KNOWN.values():
        size = f"{known.download_bytes / 2**20:.0f} MiB to fetch when it is asked for"
        here = models.is_cached(known.name)
        yield "ok" if here else "-", f"model {known.name}", "in the cache" if here else size
    if importlib.util.find_spec("pip") is None:
        yield "warn", "pip", "missing: models cannot be fetched; python -m ensurepip"


def _peers() -> Iterator[Finding]:
    for name in PEERS:
        try:
            yield "ok", f"optional: {name}", version(name)
        except PackageNotFoundError:
            yield "-", f"optional: {name}", "not found; not needed"
