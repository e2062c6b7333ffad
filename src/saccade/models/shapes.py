"""Sizes of decoder-only models, from names or a config.json: enough to reckon work and bytes. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core.errors import BadInput, UnknownName

BYTES = 2  # of a number: weights and caches are 16 bits wide here


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped heads and a gated MLP. `windowed` of the layers remember only `window_tokens`."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False  # embedding and output head are one matrix
    windowed: int = 0
    window_tokens: int = 0

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of one layer; norms and biases are a thousandth and left out."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_size
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """Of all matrices."""
        return self.layers * self.layer_parameters + self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def kv_bytes(self) -> int:
        """Of one token's key and value in one layer."""
        return 2 * self.kv_heads * self.head_size * BYTES


# as their config.json files say
SHAPES = {
    s.name: s
    for s in (
        Shape("llama-3-8b", 32, 4096, 14336, 32, 8, 128, 128256),
        Shape("llama-3-70b", 80, 8192, 28672, 64, 8, 128, 128256),
        Shape("smollm2", 30, 576, 1536, 9, 3, 64, 49152, tied=True),
        Shape("gemma3-270m", 18, 640, 2048, 4, 1, 256, 262144, tied=True, windowed=15, window_tokens=512),
        Shape("qwen2.5-coder-1.5b", 28, 1536, 8960, 12, 2, 128, 151936, tied=True),
        Shape("minimind2-small", 8, 512, 1408, 8, 2, 64, 6400, tied=True),
    )
}


def shape(name: str | Path) -> Shape:
    """Of a known name (case and a missing hyphen do not matter), or of a config.json or the folder that holds it.

    Raises:
        UnknownName: neither.
        BadInput: a config.json that cannot be read, or that is not of such a model.
    """
    path, known = Path(name), {key.replace("-", ""): one for key, one in SHAPES.items()}
    if path.is_dir() and (path / "config.json").is_file():
        return _read(path / "config.json")
    if path.is_file():
        return _read(path)
    found = known.get(str(name).lower().replace("-", ""))
    if found is None:
        raise UnknownName("model shape", str(name), SHAPES, f"Say one of {', '.join(SHAPES)}, or a config.json.")
    return found


def _read(file: Path) -> Shape:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        found = f"it is no JSON that can be read: {e}"
        raise BadInput(f"the shape of {file.name}", found, "Give a config.json.") from e
    if not isinstance(config, dict):
        raise BadInput(f"the shape of {file.name}", "it is no JSON object", "Give a config.json.")
    return of_config(config.get("text_config", config), file.parent.resolve().name)


def of_config(config: dict[str, Any], name: str) -> Shape:
    """From what a config.json of transformers says of its text model.

    Raises:
        BadInput: a size is missing, or it mixes experts.
    """
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise BadInput(f"the shape of {name}", f"its config has no {', '.join(missing)}", "Give one that names them.")
    if config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts"):
        raise BadInput(f"the shape of {name}", "it mixes experts, which are not reckoned", "Give a dense model.")
    layers, hidden, intermediate, heads, vocabulary = (config[key] for key in needed)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    kinds = config.get("layer_types") or ["sliding_attention"] * layers  # without it a window is every layer's
    windowed = sum(kind == "sliding_attention" for kind in kinds[:layers]) if window else 0
    return Shape(
        name, layers, hidden, intermediate, heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or hidden // heads,
        vocabulary=vocabulary,
        tied=bool(config.get("tie_word_embeddings", False)),
        windowed=windowed,
        window_tokens=window if windowed else 0,
    )  # fmt: skip
