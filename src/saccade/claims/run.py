"""`claim`: measure again what papers say, compute the verdicts, and keep them."""

from __future__ import annotations

import datetime
import importlib
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from saccade.claims import _found
from saccade.claims._contract import SEED, TIERS, Progress, plain
from saccade.core import registry
from saccade.core.errors import BadOption, CannotRun, SaccadeError
from saccade.measure.environment import environment


def claim(names: str | Sequence[str], tier: str = "cpu", progress: Progress | None = None) -> list[dict[str, Any]]:
    """Measure the claims of these methods, one after the other; each result is kept as soon as it is there.

    tier: "smoke" (seconds; the machinery), "cpu" (minutes, a real model) or "gpu"

    Raises:
        BadOption: no such tier.
        UnknownName: no such method.
        CannotRun: a method without a claim or without that tier, no CUDA for "gpu", nowhere to keep the result, or a
            measurement that broke off: that is no verdict, and nothing is kept of it.
    """
    check_tier(tier)
    chosen = [names] if isinstance(names, str) else names
    found = {name: _claim_of(name, tier) for name in dict.fromkeys(n.replace("_", "-") for n in chosen)}
    _found.writable()
    lines = []
    for name in found:
        lines.append(measured(name, tier, progress))
        _found.append(lines[-1])
    return lines


def check_tier(tier: str) -> None:
    """Whether it is one.

    Raises:
        BadOption: it is none.
    """
    if tier not in TIERS:
        raise BadOption(f"tier={tier!r}", f"there are {', '.join(TIERS)}", "Give one of these.")


def _claim_of(name: str, tier: str) -> ModuleType:
    file = Path(__file__).parent / f"{registry.card(name).name.replace('-', '_')}.py"
    if not file.is_file():
        do = f"It needs a file {file.name} beside the others, with CLAIM and measure(tier, progress)."
        raise CannotRun(f"claim {name}", "nobody has written down what it claims", do)
    module = importlib.import_module(f"saccade.claims.{file.stem}")
    if tier not in module.CLAIM.tiers:
        known = ", ".join(module.CLAIM.tiers)
        raise CannotRun(f"claim {name}", f"it is not measured at tier {tier!r}", f"Its tiers are: {known}.")
    if tier == "gpu" and not torch.cuda.is_available():
        raise CannotRun("tier='gpu'", "torch sees no CUDA device", "Measure with tier='cpu'.")
    return module


def measured(name: str, tier: str, progress: Progress | None = None) -> dict[str, Any]:
    """Measure one claim; nothing is kept.

    Raises:
        CannotRun: as `claim` does.
    """
    module, commit, start = _claim_of(name, tier), _commit(), time.perf_counter()
    try:
        evidence = module.measure(tier, progress)
    except SaccadeError:
        raise
    except Exception as e:  # whatever broke, it is no verdict
        found = f"the measurement broke off ({type(e).__name__}: {e})"
        raise CannotRun(f"claim {name} at tier {tier!r}", found, "Nothing is kept; the paper may be right.") from e
    return {
        "method": name,
        "tier": tier,
        "verdict": evidence.verdict,
        "reason": evidence.reason,
        "checks": [plain(vars(check)) for check in evidence.checks],
        "setting": evidence.setting,
        "says": module.CLAIM.says,
        "where": module.CLAIM.where,
        **_circumstances(tier),
        "seconds": round(time.perf_counter() - start, 1),
        "seed": SEED,
        "commit": commit,
        "table": [plain(row) for row in evidence.table],
    }


def _circumstances(tier: str) -> dict[str, Any]:
    here = environment("cuda" if tier == "gpu" else "cpu")
    hardware = here["device_name"] if tier == "gpu" else f"{here['cpu']}, {os.cpu_count()} cores"
    return {
        "hardware": hardware,
        "versions": {name: here[name] for name in ("saccade", "torch", "transformers", "python")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    """The commit of a source checkout, marked where the source differs from it; None outside of one."""
    if not (_found.CHECKOUT / "pyproject.toml").is_file():
        return None
    git = ["git", "-C", str(_found.CHECKOUT)]
    source = ["--", "src", ":!src/saccade/claims/found"]
    try:
        head, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", *source])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")
