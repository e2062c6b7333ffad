"""On what a run was made. Nothing personal: no user, host, path or environment variable is read."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import saccade


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, processor, threads and precision flags; written to env.json. What decides is in every cell's key."""
    place = torch.device(device)
    return {
        "saccade": saccade.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_bytes(),
        "device": place.type,
        "device_name": torch.cuda.get_device_name(place) if place.type == "cuda" else cpu_name(),
        "cuda": torch.version.cuda,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def deciding(environment: dict[str, Any]) -> dict[str, Any]:
    """What a result may depend on: all but the memory, of which some machines are given more as they use it."""
    return {name: value for name, value in environment.items() if name != "memory_bytes"}


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits of any JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def sources(parts: tuple[str, ...] = ("",)) -> str:
    """Digest of our own source, or of some folders and files of it."""
    root = Path(saccade.__file__).parent
    files = [f for part in parts for f in ([root / part] if part.endswith(".py") else (root / part).rglob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()


def cpu_name() -> str:
    """The processor's own name where the system tells it, with what its vector units can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def usual_dtype(device: str) -> str:
    """bfloat16 where the device computes in it natively, which is then the faster; else float32."""
    if device.partition(":")[0] != "cpu":  # whether there is such a device is for `models.load` to say
        return "bfloat16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def memory_bytes() -> int | None:
    """Of the machine; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
