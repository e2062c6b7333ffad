"""What a method's `calibrate` is given: the model's post-RoPE tensors, gate training, and a stamp for the artefact."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoTokenizer

from saccade import __version__, ops
from saccade.attach.compat import CACHE
from saccade.attach.distil import Distilling
from saccade.attach.engine import Place
from saccade.attach.estimating import Estimating
from saccade.attach.fingerprint import fingerprint
from saccade.attach.gates import Gating, Progress
from saccade.attach.influence import Influence
from saccade.attach.listening import listening
from saccade.attach.probe import Found, probe
from saccade.attach.watch import Watch
from saccade.core.artefact import Artefact, Draft
from saccade.core.budget import FULL
from saccade.core.errors import BadInput, CannotRun
from saccade.core.method import Method, Probe, options
from saccade.core.record import Notes
from saccade.core.selection import dense

if TYPE_CHECKING:
    from saccade.methods.cache.duo_attention import DuoAttention
    from saccade.methods.sparse.moa import MoA
    from saccade.methods.sparse.sea import Sea
    from saccade.methods.sparse.seer_attention import SeerAttention

Captured = tuple[int, Tensor, Tensor, Tensor]


class Subject:
    """A model under calibration. It computes as ever and is left as it was found.

    layers, heads, kv_heads, head_size: of its full-attention layers
    fingerprint: what artefacts are found by
    drafts: where a calibration that can be interrupted keeps what it has done; None: nowhere

    Raises:
        CannotRun: the model is not served, or something is attached to it.
    """

    def __init__(self, model: Any, drafts: Path | None = None):
        self.model, self.drafts = model, drafts
        found = probe(model)
        busy = getattr(model, "_saccade_run", None)
        reasons = found.reasons + ([] if busy is None else [f"{busy.title} is attached; detach it first"])
        if found.shard.ranks > 1:
            reasons.append(f"its heads are shared among {found.shard.ranks} processes; calibrate in one")
        if reasons:
            raise CannotRun(f"calibrate on {type(model).__name__}", reasons, "See also: saccade explain")
        self.found: Found = found
        place = found.sites[0].place
        self.layers, self.heads, self.kv_heads = place.layers, place.heads, place.kv_heads
        self.head_size = place.head_size
        self.fingerprint = fingerprint(model)

    @property
    def name(self) -> str:
        """The model's name; of a local folder only the last part."""
        path = str(self.model.name_or_path)
        return Path(path).name if Path(path).exists() else path

    def capture_qkv(self, samples: Sequence[Tensor]) -> Iterator[Captured]:
        """(layer, q [1 h n d], k [1 g n d], v [1 g n d]) after RoPE: every layer of every sample [1 n], in that order.

        One sample's tensors are held at a time.

        Raises:
            BadInput: no samples, or a sample that is not [1 n].
        """
        for ids in checked(samples):
            held: list[Captured] = []
            with listening(self.model, self.found, lambda spot: _Tap(spot.place, held)), torch.no_grad():  # noqa: B023
                self.model(input_ids=ids.to(self.model.device), use_cache=False)
            yield from held

    def rows(self, samples: Sequence[Tensor]) -> list[Int[Tensor, "1 n"]]:
        """The samples, once they are found to be rows of token ids.

        Raises:
            BadInput: no samples, or a sample that is not [1 n].
        """
        return checked(samples)

    def words(self, samples: Sequence[Tensor]) -> Int[Tensor, " m"]:
        """Ids of the tokens that occur in the samples, ascending: what random texts are drawn from. Made of these, they
        hold no special and no unused token.

        Raises:
            BadInput: no samples, or a sample that is not [1 n].
        """
        return torch.cat(checked(samples), 1).unique().cpu()

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that lies beside the model.

        Raises:
            CannotRun: there is none.
        """
        try:
            return AutoTokenizer.from_pretrained(self.model.name_or_path)
        except (OSError, ValueError) as e:
            name = self.name or type(self.model).__name__
            raise CannotRun(
                f"calibrate on {name}", "no tokenizer lies beside it, and recall texts are made of words", "Load both."
            ) from e

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Ids after which the model has ended its text."""
        said = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset([] if said is None else [said] if isinstance(said, int) else said)

    @torch.no_grad()
    def answer(self, probe: Probe, prompt: Int[Tensor, "1 n"], most: int, stops: Collection[int]) -> Notes:
        """What the model says after a prompt, greedily, at most so many tokens and none after a stop, and what the
        probe noted meanwhile. The prompt's last token is read as the first step.

        `tokens` has one more than was read: the last that was said.
        """
        stops, said = self.ends | set(stops), prompt[:, -1:].to(self.model.device)
        with Watch(self.model, [probe], FULL, 0, self.found)._enter() as run:
            cache = run.new_cache()
            with run.prompt():
                self.model(prompt[:, :-1].to(self.model.device), **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            for _ in range(most):
                logits = self.model(said, **{CACHE: cache}, use_cache=True).logits
                said = logits[:, -1:].argmax(-1)
                if int(said) in stops:
                    break
            (notes,) = run.notes()
        return dataclasses.replace(notes, tokens=torch.cat([notes.tokens, said[0].cpu()]))

    def train_gates(
        self, recipe: DuoAttention, samples: Sequence[Tensor], progress: Progress | None = None
    ) -> tuple[Float[Tensor, "layers g"], dict[str, float]]:
        """A gate per key/value head, full (1) or streaming (0) or between, and figures of the training.

        Recall texts are made of the samples, which are the haystack; `attach.gates` says how.
        """
        return Gating(self, recipe).train(checked(samples), progress)

    def distil_gates(
        self, recipe: SeerAttention, samples: Sequence[Tensor], progress: Progress | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Gates of all layers that guess the model's own attention maps by blocks, and figures of the training;
        `attach.distil` says how. Interrupted, it goes on where it was.
        """
        rows = checked(samples)
        return Distilling(self, recipe, self.draft(recipe, rows)).train(rows, progress)

    def distil_estimators(
        self, recipe: Sea, samples: Sequence[Tensor], progress: Progress | None = None
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Estimators of all layers that draw the model's own attention maps, and figures of the training;
        `attach.estimating` says how. Interrupted, it goes on where it was.
        """
        rows = checked(samples)
        return Estimating(self, recipe, self.draft(recipe, rows)).train(rows, progress)

    def draft(self, method: Method, samples: Sequence[Tensor]) -> Draft:
        """Where this calibration keeps what it has done: other options, samples or models are others."""
        if self.drafts is None:
            return Draft()
        said = f"{self.fingerprint} {options(method)} {_describe(samples)}"
        return Draft(self.drafts / method.card.name / hashlib.sha256(said.encode()).hexdigest()[:16])

    def influence(self, recipe: MoA, samples: Sequence[Tensor]) -> Influence:
        """What profiles how much each block of keys is worth to the loss; `attach.influence` says how.

        Raises:
            BadInput: no samples, or a sample that is not [1 n].
        """
        return Influence(self, recipe, checked(samples))

    def artefact(
        self, method: Method, tensors: Mapping[str, Tensor], samples: Sequence[Tensor], figures: Mapping[str, Any]
    ) -> Artefact:
        """The tensors, stamped with the model, the method's options and a hash of the samples."""
        return Artefact(
            method=method.card.name,
            tensors={name: t.detach().cpu() for name, t in tensors.items()},
            model=self.name,
            fingerprint=self.fingerprint,
            options=options(method),
            data=_describe(samples),
            version=__version__,
            figures=figures,
        )


class _Tap:
    """Dense attention that keeps what came in."""

    def __init__(self, place: Place, held: list[Captured]):
        self.place, self.held, self.run = place, held, SimpleNamespace(title="calibrate")

    def forward(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        self.held.append((self.place.layer, q, k, v))
        whole = dense(q.shape[2], k.shape[2])
        return ops.attend(q, k, v, whole, scale=self.place.scale, softcap=self.place.softcap)[0]


def checked(samples: Sequence[Tensor]) -> list[Tensor]:
    """The samples, all of them rows of token ids.

    Raises:
        BadInput: no samples, or a sample that is not [1 n].
    """
    rows = list(samples)
    if not rows:
        raise BadInput("calibrate", "there are no samples", "Give rows of token ids [1 n].")
    for i, row in enumerate(rows):
        if row.dim() != 2 or row.shape[0] != 1 or row.shape[1] == 0 or row.is_floating_point():
            raise BadInput(f"calibration sample {i}", f"it is {row.dtype} {tuple(row.shape)}", "Give token ids [1 n].")
    return rows


def _describe(samples: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for row in samples:
        digest.update(row.cpu().to(torch.int64).numpy().tobytes())
    return f"{len(samples)} rows, {sum(r.shape[1] for r in samples)} tokens, sha256 {digest.hexdigest()[:16]}"
