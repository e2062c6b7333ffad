"""A fetched file to what transformers loads in under a second: bfloat16 safetensors, config, tokenizer."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from saccade.core.errors import ModelUnavailable


def gguf(source: Path, target: Path) -> None:
    """Dequantise a GGUF file by transformers' reader and save it.

    Raises:
        ModelUnavailable: the file is cut short, or of an architecture that transformers does not read.
        OSError: it cannot be written.
    """
    model, tokenizer = read_gguf(source, torch.bfloat16)
    _save(model, target)
    tokenizer.save_pretrained(target)


def _save(model: transformers.PreTrainedModel, target: Path) -> None:
    try:
        model.save_pretrained(target)
    except SafetensorError as error:  # the operating system's words are in its text, the number is lost
        full = f"os error {errno.ENOSPC}" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, first_line(error)) from error


def read_gguf(source: Path, dtype: torch.dtype):
    """Model and tokenizer of one GGUF file, dequantised.

    Raises:
        ModelUnavailable: as in `gguf`.
    """
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelUnavailable(f"cannot read {source.name}", "it is no GGUF file", "Give one, or a model's folder.")
    place, name = source.parent, source.name
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the reader's bar heeds no setting
            model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=dtype, **_unpacked())
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    except Exception as error:  # the reader raises whatever its parts raise: struct, numpy, key and value errors
        found = f"transformers' GGUF reader stopped at {type(error).__name__}: {first_line(error)}"
        do = "The file may be cut short, or of an architecture that transformers does not read from GGUF."
        raise ModelUnavailable(f"cannot read {source.name}", found, do) from error
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:  # the weights are plain now, and saving and loading must not ask for a GGUF again
        quantizer.remove_quantization_config(model)
    return model, tokenizer


def _unpacked() -> dict[str, Any]:
    """Newer transformers keep the weights in blocks, with an attention of their own, unless told not to."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def first_line(error: BaseException) -> str:
    """Enough of a foreign error to recognise it by."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else "no text"


def onnx(source: Path, target: Path) -> None:
    """An int8 ONNX export of a Llama to `LlamaForCausalLM`, with the config and tokenizer files that lie beside it.

    Raises:
        ModelUnavailable: weights are missing.
        OSError: it cannot be written.
    """
    target.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source.parent / name, target / name)
    config = transformers.LlamaConfig(**json.loads((target / "config.json").read_text()))
    weights = dict(_weights(source))
    with torch.device("meta"):
        wanted = set(transformers.LlamaForCausalLM(config).state_dict())
    if wanted != set(weights):
        found = f"weights are missing or unknown: {', '.join(sorted(wanted ^ set(weights))[:3])}"
        raise ModelUnavailable(f"cannot read {source.name}", found, "Only ONNX exports of Llama are read.")
    model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(weights)
    _save(model.to(torch.bfloat16), target)


def _weights(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """w = (stored - zero point) * scale; ONNX keeps matrices transposed, and their names only in the nodes."""
    import onnx as reader
    from onnx import numpy_helper

    graph = reader.load(source).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            matrix = _dequantised(stored, node.input[1], node.input[3])
            found = re.match(r"/model/layers\.(\d+)/(self_attn|mlp)/(\w+_proj)/MatMul", node.name)
            name = f"model.layers.{found[1]}.{found[2]}.{found[3]}" if found else "lm_head"
            yield f"{name}.weight", torch.from_numpy(matrix.T.copy())
    for name in stored:
        if name.endswith("norm.weight"):
            yield name, torch.from_numpy(stored[name].copy())
    table = "model.embed_tokens.weight"
    matrix = _dequantised(stored, f"{table}_quantized", f"{table}_zero_point")
    yield table, torch.from_numpy(matrix)


def _dequantised(stored: dict[str, np.ndarray], name: str, zero_point: str) -> np.ndarray:
    scale = stored[name.removesuffix("_quantized") + "_scale"]
    return (stored[name].astype("f4") - stored[zero_point].astype("f4")) * scale


def reader(name: str, form: str) -> Callable[[Path, Path], None]:
    """How a fetched file is read; asked for before the download, which would else be in vain.

    Raises:
        ModelUnavailable: it takes a package that is not here.
    """
    if form == "onnx" and importlib.util.find_spec("onnx") is None:
        found = "it lies there as an ONNX file and the package onnx is missing"
        raise ModelUnavailable(f"cannot prepare the model {name!r}", found, "Install it: pip install 'saccade[onnx]'.")
    return {"gguf": gguf, "onnx": onnx}[form]
