"""What kvpress, MInference and the quantised cache of transformers make of given prompts. Started by run.py, in the
environment of requirements.txt; it knows nothing of the library.

    python benchmarks/agreement/peer.py FOLDER

FOLDER holds `model`, `inputs.safetensors` (prompts [t n], following [t m], gates [layers g], and of the prompts' last
tokens queries [t layers h 1 d] with all keys [t layers g n d]), `texts.json`, and `jobs.json`: name -> {press, options,
around, cache, reads, heads, attention, steps}. For each job NAME.safetensors is written: logits [t steps vocab] of the
tokens that follow, and of a press scores [t layers g n] and kept [t layers g n]. versions.json says what ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import pandas
import torch
from kvpress.presses import duo_attention_press
from optimum.quanto.library.extensions.extension import get_extension
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache
from transformers.utils.logging import disable_progress_bar

PACKAGES = ("kvpress", "minference", "optimum-quanto", "transformers", "torch")
Job = dict[str, Any]


def press_of(job: Job, inputs: dict[str, Tensor]) -> Any:
    """The press of a job, made as its users make it."""
    options = dict(job.get("options", {}))
    if job["press"] == "DuoAttentionPress":
        sinks, recent = options.pop("sink_size"), options.pop("recent_size")
        press = kvpress.DuoAttentionPress(**options)
        press.load_attention_pattern = lambda model: (sinks, recent, inputs["gates"].double().numpy())
        return press
    if "around" in job:
        options["press"] = press_of(job["around"], inputs)
    return getattr(kvpress, job["press"])(**options)


class Watched:
    """A press, and what it kept of the last prompt, layer by layer."""

    def __init__(self, press: Any):
        self.press, self.scores, self.kept = press, [], []
        self.scorer = getattr(press, "press", press)
        if hasattr(self.scorer, "score"):
            self.plain, self.scorer.score = self.scorer.score, self._score
        self.compress, press.compress = press.compress, self._compress

    def _score(self, *args: Any) -> Tensor:
        self.scores.append(self.plain(*args))
        return self.scores[-1].clone()  # Ada-KV's press writes into what it is given

    def _compress(self, module: Any, hidden: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Any:
        out = self.compress(module, hidden, keys, values, *rest)
        stays = torch.ones(keys.shape[:3], dtype=torch.bool)
        if getattr(module, "masked_key_indices", None) is not None:
            stays[module.masked_key_indices] = False
        elif out[0].shape[2] < keys.shape[2]:
            best = self.scores[-1].topk(out[0].shape[2], dim=-1).indices
            stays = torch.zeros_like(stays).scatter_(-1, best, True)
            assert torch.equal(out[0].sort(2).values, self._rows(keys, stays).sort(2).values), "it keeps other keys"
        self.kept.append(stays)
        return out

    @staticmethod
    def _rows(keys: Tensor, stays: Tensor) -> Tensor:
        return keys[stays].view(*keys.shape[:2], -1, keys.shape[3])


@torch.no_grad()
def pressed(model: Any, job: Job, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a press keeps of every prompt, and the logits after it. No press: the model as it is."""
    out: dict[str, list[Tensor]] = {}
    for ids, after in zip(inputs["prompts"], inputs["following"]):
        cache = DynamicCache()
        found: dict[str, Tensor] = {}
        if job.get("press"):
            watched = Watched(press_of(job, inputs))
            with watched.press(model):
                model(ids[None], past_key_values=cache, logits_to_keep=1)
            found["kept"] = torch.cat(watched.kept)
            if watched.scores:
                found["scores"] = torch.cat(watched.scores)
        else:
            model(ids[None], past_key_values=cache, logits_to_keep=1)
        found["logits"] = steps(model, cache, len(ids), after[: job["steps"]])
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        for name, x in found.items():
            out.setdefault(name, []).append(x)
    return {name: torch.stack(rows).contiguous() for name, rows in out.items()}


@torch.no_grad()
def quantised(model: Any, job: Job, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the quantised cache holds of every prompt, read back, and the logits after it."""
    get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=unpack)
    out: dict[str, list[Tensor]] = {"keys": [], "values": [], "logits": []}
    for ids, after in zip(inputs["prompts"], inputs["following"]):
        cache = QuantizedCache(config=model.config, backend="quanto", **job["options"])
        model(ids[None], past_key_values=cache, logits_to_keep=1)
        for name in ("keys", "values"):
            held = [layer._dequantize(getattr(layer, f"_quantized_{name}")) for layer in cache.layers]
            out[name].append(torch.cat(held))
        out["logits"].append(steps(model, cache, len(ids), after[: job["steps"]]))
    return {name: torch.stack(rows).contiguous() for name, rows in out.items()}


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes in bytes, lowest bits first, slot behind slot: in place of a helper that quanto would have compiled."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])


def steps(model: Any, cache: Any, prompt: int, after: Tensor) -> Tensor:
    """Logits [m vocab], one token at a time at its true position."""
    out = []
    for i, token in enumerate(after.view(-1, 1, 1)):
        at = torch.tensor([prompt + i])
        out.append(model(token, past_key_values=cache, cache_position=at, position_ids=at[None]).logits[0, -1])
    return torch.stack(out)


@torch.no_grad()
def read(job: Job, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which keys a query of each head reads, by MInference's Quest; [t layers h n]. Its package starts with kernels
    that need CUDA, so this one file of it is loaded."""
    home = importlib.util.find_spec("minference").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("minference_quest", Path(home) / "modules" / "quest.py")
    quest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quest)
    masks, plain = [], quest.local_heavy_hitter_mask
    quest.local_heavy_hitter_mask = lambda *given: masks.append(plain(*given)[0, :, 0]) or masks[-1][None, :, None]
    layers, keys = inputs["queries"].flatten(0, 1), inputs["keys"].flatten(0, 1)
    for q, k in zip(layers, keys):
        k = k.repeat_interleave(q.shape[0] // k.shape[0], 0)[None]
        asked = {"attn_forward_config": job["options"], "position_ids": torch.tensor([[k.shape[2] - 1]])}
        quest.quest_decode_kernel(q[None], k, k, asked)
    return {"kept": torch.stack(masks).unflatten(0, inputs["queries"].shape[:2]).contiguous()}


def on_the_fly(model: Any, folder: Path) -> dict[str, Tensor]:
    """kvpress' own scores of heads for DuoAttention, of our texts in place of a dataset that must be fetched."""
    texts = json.loads((folder / "texts.json").read_text())
    frame = SimpleNamespace(to_pandas=lambda: pandas.DataFrame({"chapter": texts}))
    duo_attention_press.load_dataset = lambda *_, **__: frame
    return {"gates": torch.from_numpy(duo_attention_press.duo_attention_on_the_fly(model, num_samples=len(texts)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=torch.float32).eval()
    inputs = load_file(args.folder / "inputs.safetensors")
    for name, job in json.loads((args.folder / "jobs.json").read_text()).items():
        print(f"peer: {name}", flush=True)
        model.set_attn_implementation(job.get("attention", "sdpa"))
        if job.get("cache"):
            found = quantised(model, job, inputs)
        elif job.get("reads"):
            found = read(job, inputs)
        elif job.get("heads"):
            found = on_the_fly(model, args.folder)
        else:
            found = pressed(model, job, inputs)
        save_file(found, args.folder / f"{name}.safetensors")
    (args.folder / "versions.json").write_text(json.dumps({name: version(name) for name in PACKAGES}))


if __name__ == "__main__":
    main()
