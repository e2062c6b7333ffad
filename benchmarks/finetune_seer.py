"""Fine-tune a model under SeerAttention's gates to a longer context, as in the paper's second experiment.

    PYTHONPATH=src python benchmarks/finetune_seer.py --model PATH/smollm2 --device cuda --text PATH/long.txt \
        --factor 4 --tokens 32768 --budget 0.1 --steps 200 --out OUT

Positions are stretched by `--factor` (YaRN) first. The gates begin as trained for the model, or are trained on the
first rows if there are none. Then each step adds the loss of the next tokens, in attention over the blocks that the
gates choose, and the distance of the gates from the maps. The last row is left out and measured before and after.
OUT then holds the model with its tokenizer, and its gates, which `saccade` finds again from its own cache.
On two threads of a CPU `--factor 2 --tokens 512 --steps 20` shows in some minutes that it runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

import saccade
from saccade import models
from saccade.attach import attach
from saccade.attach.fingerprint import fingerprint
from saccade.attach.tuning import Tuning
from saccade.core.artefact import Artefact
from saccade.core.paths import cache_dir
from saccade.methods.sparse.seer_attention import SeerAttention
from saccade.tasks import moby_dick

MEASURED = 0.1, 0.5, 1.0  # shares of the pairs at which the row that was left out is read


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--text", type=Path, help="a long plain text (the shipped one)")
    parser.add_argument("--factor", type=float, default=1.0, help="how many times longer the context is to be")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the pairs while training")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-5, help="learning rate of the model")
    parser.add_argument("--gate-rate", type=float, default=1e-3)
    parser.add_argument("--gate-weight", type=float, default=1.0)
    parser.add_argument("--gate-rows", type=int, default=16, help="rows that first gates are trained on")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def stretch(model: Any, factor: float) -> None:
    """YaRN: positions for a context so many times as long."""
    config = model.config
    rope = dict(config.rope_parameters)
    rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": config.max_position_embeddings}
    config.rope_parameters = rope
    config.max_position_embeddings = int(config.max_position_embeddings * factor)
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(config=config).to(model.device)


@torch.no_grad()
def losses(model: Any, method: SeerAttention, row: torch.Tensor) -> str:
    """Of a row, at several shares."""
    found = {}
    for share in MEASURED:
        with attach(model, method, budget=share):
            found[share] = float(model(input_ids=row, labels=row, use_cache=False).loss)
    return ", ".join(f"{loss:.4f} at {share}" for share, loss in found.items())


def gates(model: Any, rows: list[torch.Tensor]) -> SeerAttention:
    """The method with gates for this model."""
    made = Artefact.find("seer-attention", fingerprint(model)) or saccade.calibrate(model, "seer-attention", rows)
    return SeerAttention(artefact=made)


def main() -> None:
    given = arguments()
    model, tokenizer = models.load(given.model, dtype=given.dtype, device=given.device)
    text = given.text.read_text(encoding="utf-8") if given.text else moby_dick()
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]], device=given.device)
    *rows, last = [row for row in ids.split(given.tokens, 1) if row.shape[1] == given.tokens]
    if given.factor != 1:
        stretch(model, given.factor)
    method = gates(model, rows[: given.gate_rows])
    print(f"before: {losses(model, method, last)}", flush=True)
    tuning = Tuning(model, method, given.budget, given.gate_weight)
    groups = [{"params": model.parameters(), "lr": given.rate}]
    groups += [{"params": tuning.gates.values(), "lr": given.gate_rate}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    for step in range(given.steps):
        loss, apart = tuning.step(rows[step % len(rows)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        print(f"{step + 1}/{given.steps} loss {loss:.4f}, distance {apart:.4f}", file=sys.stderr, flush=True)
    tuned = tuning.tuned(rows[: given.steps])
    print(f"after: {losses(model, tuned, last)}")
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    assert tuned.artefact is not None
    tuned.artefact.save(given.out / "seer-attention")
    tuned.artefact.save(cache_dir("artefacts", "seer-attention", tuned.artefact.fingerprint))


if __name__ == "__main__":
    main()
