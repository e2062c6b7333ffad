"""What each of several processes does in test_parallel.py, and what one does alone, for comparison.

Started by torchrun: `parallel_work.py FOLDER`; the first process writes FOLDER/found.pt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import saccade
from saccade import models
from saccade.attach import fingerprint
from saccade.attach.estimating import first_weights
from saccade.core import rng
from saccade.core.artefact import Artefact
from saccade.core.errors import CannotRun
from saccade.core.method import Method
from saccade.core.registry import card, get, list_methods
from saccade.engines import parallel
from saccade.measure.training import Plan, loop, sharded
from saccade.methods.sparse.minference import CANDIDATES
from saccade.methods.sparse.seer_attention import stored
from tests.conformance.cases import ATTACHED, Case

LAYERS, HEADS, KV_HEADS, SIZE = 2, 4, 2, 16
TOKENS, NEW, PADDING = 33, 2, 6
BUDGETS = {"tidaldecode": 0.75, "kivi": 1.0}  # one of two layers chooses; one drops nothing
# heads are cut in one place, whether they are a model's or a text's: here those that do most with it
BY_HEADS = ("full", "adakv", "duo-attention", "sea", "tidaldecode", "tova")
TRAINED = ("full", "minference")
RINGS = ("full", "duo-attention")
METHODS = [name for name in list_methods() if card(name).family in ATTACHED]


def drawn(name: str, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=rng.generator(f"parallel/{name}"))


def artefacts() -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Random ones, for all heads of the model: what calibration would leave takes too long."""
    channels = drawn("channels", LAYERS, KV_HEADS, SIZE).argsort(-1).to(torch.int16)
    gates = {"keys": drawn("gates", LAYERS, HEADS, 3 * SIZE, SIZE) - 0.5}
    return {
        "double-sparsity": ({name: channels for name in ("q", "k", "qk")}, {}),
        "duo-attention": ({"gates": drawn("duo", LAYERS, KV_HEADS)}, {}),
        "minference": (
            {"pattern": (drawn("patterns", LAYERS, HEADS) * len(CANDIDATES)).long()},
            {"candidates": [list(pattern) for pattern in CANDIDATES]},
        ),
        "moa": ({name: drawn(name, LAYERS, KV_HEADS, 3).cumsum(-1) * 4 for name in ("alpha", "beta")}, {}),
        "razor-attention": ({name: drawn(name, LAYERS, KV_HEADS) for name in ("induction", "echo")}, {}),
        "retrieval-head": ({"score": drawn("score", LAYERS, HEADS), "active": drawn("active", LAYERS, HEADS)}, {}),
        "sea": (first_weights(LAYERS, HEADS, SIZE, get("sea")().pixels), {}),
        "seer-attention": (stored(gates), {}),
        "tidaldecode": ({"recall": drawn("recall", LAYERS, HEADS, LAYERS)}, {}),
    }


def equipped(name: str, model: Any) -> Method:
    """In the sizes of a tiny model, with an artefact that is the whole model's."""
    method = Case(name).method()
    if not method.card.calibrated:
        return method
    tensors, figures = artefacts()[name]
    artefact = Artefact(name, tensors, "tiny", fingerprint(model), figures=figures)
    return dataclasses.replace(method, artefact=artefact)


def text() -> tuple[Tensor, Tensor]:
    """Two rows, one of them padded on the left."""
    ids = torch.randint(3, 128, (2, TOKENS), generator=rng.generator("parallel/text"))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return ids, mask


def written(name: str, model: Any) -> list[Tensor]:
    """Greedy tokens and the logits before each; of a probe also its table."""
    ids, mask = text()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    with saccade.attach(model, equipped(name, model), budget=BUDGETS.get(name, 0.25)) as run:
        out = model.generate(ids, attention_mask=mask, output_logits=True, **options)
        table = [row["copied"] for row in run.result()] if "observe" in run.parts else []
        held = 0 if table else run.record.bytes_held
    return [out.sequences, torch.stack(out.logits), torch.tensor(table), torch.tensor(held)]


def trained(name: str, model: Any) -> list[Tensor]:
    """Loss, gradients in one row, logits of the whole text, and what the forward left for the backward."""
    ids, model = text()[0], model.train()
    model.zero_grad(set_to_none=True)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x if x._base is None else x._base, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saccade.attach(model, equipped(name, model), budget=BUDGETS.get(name, 0.25)) as run:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(ids, labels=ids).loss
        loss.backward()
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
    if run.text is not None:
        parallel.average_gradients(model)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.eval()
    return [loss.detach(), gradients, logits, torch.tensor(sum(kept.values()))]


class BrokenOff(Exception):
    """In the middle of a training."""


def shared_weights(folder: Path) -> dict[str, Any]:
    """A training with FSDP, broken off between two checkpoints and taken up again."""
    options = {"VERSION": "2", "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true"}
    os.environ |= {f"FSDP_{name}": value for name, value in options.items()}
    told: list[int] = []

    def tell(step: int, loss: float) -> None:
        told.append(step)
        if len(told) == 3:
            raise BrokenOff

    with contextlib.suppress(BrokenOff):
        loop.run(cell(folder / "two", sharded.accelerator("cpu"), tell))
    losses = loop.run(cell(folder / "two", sharded.accelerator("cpu"), tell))["losses"]
    return {"losses": losses, "steps": told}


def cell(folder: Path, accelerator: Accelerator, tell: Callable[[int, float], None]) -> loop.Work:
    """A training of a few steps."""
    sizes = {"tokens": 16, "rows": 4, "steps": 4, "channels": 8, "layers": 2, "heads": 2}
    plan = Plan.of("mqar", "4tok", dtype="float64", learning_rate=None, **sizes)
    return loop.Work(plan, "full", "full", 0, folder, accelerator, 2, tell)


def said(work: Callable[[], Any]) -> str:
    """The text of a refusal; empty if there was none."""
    try:
        work()
    except CannotRun as error:
        return str(error)
    return ""


def alone(folder: Path, **options: Any) -> Any:
    """The model whose copy lies there."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64, **options).eval()


def attached(model: Any, name: str, way: str) -> Callable[[], None]:
    """Sharing a text that way with a method."""

    def work() -> None:
        with parallel.sequence(way), saccade.attach(model, equipped(name, model)):
            model.generate(text()[0], max_new_tokens=1, pad_token_id=0)

    return work


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    split, whole = alone(folder, tp_plan="auto"), alone(folder)
    found: dict[str, Any] = {"tensor": {name: written(name, split) for name in METHODS}}
    probes = [name for name in METHODS if card(name).family == "probes"]
    with parallel.sequence():
        found["heads"] = {name: written(name, whole) for name in BY_HEADS}
        found["heads, trained"] = {name: trained(name, whole) for name in TRAINED}
    with parallel.sequence("ring"):
        found["ring, trained"] = {name: trained(name, whole) for name in RINGS}
    found["said"] = {
        "load": said(lambda: saccade.load(folder / "uneven", tp_plan="auto")),
        "attach": said(lambda: saccade.attach(split_unevenly(), "full")),
        "calibrate": said(lambda: saccade.calibrate(split, "razor-attention", [])),
        "ring": said(attached(whole, "quest", "ring")),
        "ring cache": said(attached(whole, "full", "ring")),
        "probe": said(attached(whole, probes[0], "heads")),
    }
    found["weights"] = shared_weights(folder)
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def split_unevenly() -> Any:
    """As if three processes shared its heads."""
    model = models.tiny("llama", heads=HEADS, kv_heads=KV_HEADS)
    model._tp_size = 3
    return model


if __name__ == "__main__":
    assert "RANK" in os.environ, "torchrun starts this"
    main(Path(sys.argv[1]))
