"""TidalDecode: two layers choose the keys of a new token exactly, the layers behind each of them read the same."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saccade import ops
from saccade.core.artefact import Artefact
from saccade.core.card import Card
from saccade.core.errors import BadOption
from saccade.core.method import Decode
from saccade.core.selection import Gather, Selection, dense
from saccade.core.site import Site

QUERIES = 32  # last queries of a sample whose best keys calibration compares
SHARE = 16  # it looks at the best sixteenth of the keys


@dataclass(frozen=True)
class TidalDecode(Decode):
    """The keys that matter to a head are much the same in neighbouring layers: choose them twice, read them everywhere.

    For every new token, layer s ranks all keys exactly, and so does layer c:  P = top_k(q . K^T),  one list per head.
    Every other layer behind s reads what the last of the two chose, head by head:  o = softmax(q K_P^T / sqrt(d)) V_P.
    The layers up to s, and c, attend to everything. Calibration finds the c whose keys are most often those that the
    layers behind would choose for themselves.

    dense_layers: first layers that read everything; s is the one after them
    reselect_layer: c, counted from 0 among the attention layers; "calibrated", or "none" to choose in s alone
    group: "per-head": each query head has its own list; "sum": the query heads of a key/value head share the list of
        their summed probabilities
    force_current: the new token's own key is always in the list, within the budget
    correct_tokens: so many tokens after the prompt are read again, densely, which replaces their keys and values; then
        the next so many. Between two forwards, so that tokens read in one stay as they are. 0: never

    A fraction as budget pays for the layers that read everything; a budget in tokens or bytes holds in each layer, and
    the layers that would read everything then read their own best keys, as they do where a fraction cannot pay.

    Raises:
        BadOption: a reselect_layer that is neither a number nor one of the two words.
        CannotRun: while reading, correct_tokens where tokens cannot be noted or taken back.
    Source: arXiv 2410.05076; DerrickYLJ/TidalDecode, modify_llama.py and llama_tidaldecoding.py.
    """

    persistent: ClassVar[bool] = True
    card = Card(
        name="tidaldecode",
        title="TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
        family="decode",
        paper="arXiv:2410.05076",
        year=2024,
        authors="Yang, Zhang, Chen, Li, Jia",
        official="DerrickYLJ/TidalDecode",
        licence_of_official="Apache-2.0",
        summary="Two layers choose the keys of a new token exactly; the layers behind them read the same positions.",
        equation="P = top_k(q K^T) in layers s and c;  o = softmax(q K_P^T / sqrt(d)) V_P behind them",
        usual=True,
        budget="stored keys that each new query reads, mean over the layers",
        calibrated=True,
        departures=(
            "The layers that read everything are part of the budget. The authors fix k, 256 or 512, and do not count"
            " them. A budget in tokens holds in those layers too; they then read their own best keys.",
            "c is the layer that makes the recall of all layers behind s best, on plain text. The authors pick"
            " it by recall on needles, and fix it: 13 of 32 for Llama-3, 7 for Llama-2.",
            "The new token's own key is always read, as in the authors' fast path; in their accuracy code it competes.",
            "Lists are per query head, as in the authors' accuracy code; group=sum is ours.",
            "Every token after the prompt is read so, and the prompt densely, also in chunks. The authors' code tells"
            " the two apart by shape, and would read the later chunks of a prompt sparsely.",
            "Cache correction is in the paper only; here it is off unless asked for, and happens between forwards.",
        ),
        lacks={"backward": "it reads a cache, which training does not have"},
    )

    dense_layers: int = 2
    reselect_layer: int | Literal["calibrated", "none"] = "calibrated"
    group: Literal["per-head", "sum"] = "per-head"
    force_current: bool = True
    correct_tokens: int = 0

    def __post_init__(self):
        super().__post_init__()
        again = self.reselect_layer
        number = isinstance(again, int) and not isinstance(again, bool) and again >= 0
        if not number and again not in ("calibrated", "none"):
            asked = f"tidaldecode.reselect_layer={again!r}"
            raise BadOption(asked, "it takes a layer's number, 'calibrated' or 'none'", "Give one of these.")

    @property
    def reread_tokens(self) -> int:
        return self.correct_tokens

    @property
    def replays(self) -> bool:
        return True

    def check(self, site: Site) -> list[str]:
        again, shape = self.reselect_layer, (site.layers, site.all_heads, site.layers)
        if again == "calibrated" and self.artefact is None:
            return ["no layer to choose anew was found for this model: saccade calibrate tidaldecode"]
        if again == "calibrated" and tuple(self._recall.shape) != shape:
            return [f"its recalls are [layers, heads, layers] = {list(self._recall.shape)}, here: {list(shape)}"]
        if isinstance(again, int) and not self.dense_layers < again < site.layers:
            return [
                f"reselect_layer={again} must lie behind layer s, which dense_layers={self.dense_layers} makes layer"
                f" {self.dense_layers}, and before {site.layers}, the number of layers"
            ]
        if site.budget.unit == "fraction" and site.budget.amount == 1:
            return []
        if self.dense_layers + 2 > site.layers:
            return [f"dense_layers={self.dense_layers} of {site.layers} leaves no layer that could read a list again"]
        whole = self._whole_layers
        if site.budget.unpaid(site.layers, whole):
            return [
                f"dense_layers={self.dense_layers} and the layers that choose, together {whole} of {site.layers}, alone"
                f" exceed budget={site.budget}; change one of the two"
            ]
        return []

    def select(self, q: Float[Tensor, "b h q d"], stored: Mapping[str, Tensor], site: Site) -> Selection:
        seen = list(range(site.offset + 1, site.keys + 1))
        few, many = self._counts(site, site.layers - 1), self._counts(site, 0)
        ranks = site.layer <= self.dense_layers or site.layer in self.choosing
        if few == seen or (ranks and many == seen and site.layer not in self.choosing):
            return dense(site.queries, site.keys)
        if not ranks:
            assert "index" in site.handed, "a layer before this one has chosen"
            return Gather(index=site.handed["index"].to(q.device), queries=site.queries, keys=site.keys)
        score = self._scores(q, stored["keys"], site)
        if site.layer in self.choosing:
            site.handed["index"] = _best(score, few, site)
        if many == seen:
            return dense(site.queries, site.keys)
        index = site.handed["index"] if few == many and site.layer in self.choosing else _best(score, many, site)
        return Gather(index=index, queries=site.queries, keys=site.keys)

    def calibrate(self, model: Any, samples: Sequence[Tensor], progress: Any = None) -> Artefact:
        total = torch.zeros(model.layers, model.heads, model.layers, dtype=torch.float64)
        before: list[Tensor] = []
        for step, (layer, q, k, _) in enumerate(model.capture_qkv(samples), 1):
            if layer == 0:
                before = []
            before.append(best_keys(q, k)[0])
            shared = torch.stack([(other & before[-1]).sum((-2, -1)) / other.sum((-2, -1)) for other in before]).cpu()
            total[: layer + 1, :, layer] += shared
            total[layer, :, :layer] += shared[:layer].T
            if progress is not None and layer == model.layers - 1:
                progress(step // model.layers, len(samples), "comparing layers")
        recall = (total / len(samples)).float()
        mean = recall.mean(1)
        again = best_layer(mean, self.dense_layers)
        figures = {"layer that chooses anew": again}
        if self.dense_layers + 1 < model.layers:
            alone, both = (float(reused(mean, self.dense_layers, c).mean()) for c in (None, again))
            figures |= {"recall of the layers behind s": round(alone, 4), "with it": round(both, 4)}
        return model.artefact(self, {"recall": recall}, samples, figures)

    @functools.cached_property
    def choosing(self) -> tuple[int, ...]:
        """The layers that choose for those behind them: s, and c if there is one."""
        again = self.reselect_layer
        if again == "calibrated":
            again = best_layer(self._recall.float().mean(1), self.dense_layers)
        return (self.dense_layers, again) if isinstance(again, int) else (self.dense_layers,)

    @property
    def _whole_layers(self) -> int:
        """How many layers read everything."""
        return self.dense_layers + len(self.choosing)

    @property
    def _recall(self) -> Float[Tensor, "layers h layers"]:
        """[i, head, j]: the share of the best keys of a head in layer j that are also its best in layer i."""
        assert self.artefact is not None, "check refuses to run without recalls"
        return self.artefact.tensors["recall"]

    def _counts(self, site: Site, layer: int) -> list[int]:
        """Keys that each query reads: in layer 0 if all is read there, in the last layer where lists are reused."""
        budget, each = site.budget, range(site.offset + 1, site.keys + 1)
        if budget.unit != "fraction":
            return [budget.tokens(n, site.bytes_per_token) for n in each]
        return [budget.layer_tokens(n, layer, site.layers, self._whole_layers) for n in each]

    def _scores(
        self, q: Float[Tensor, "b h q d"], k: Float[Tensor, "b g k d"], site: Site
    ) -> Float[Tensor, "b g s q k"]:
        """Of the keys for each list of a key/value head; -inf for those ahead of a query."""
        at = torch.arange(site.keys, device=q.device)
        behind = at[site.offset :, None] - at
        if site.queries == 1:  # without a copy of the keys in float32
            score = ops.column_scores(q, k, scale=site.scale, softcap=site.softcap)[:, :, None]
            score = score.unflatten(1, (site.kv_heads, -1))
        else:
            wide = torch.promote_types(q.dtype, torch.float32)
            score = q.to(wide).unflatten(1, (site.kv_heads, -1)) @ k.to(wide)[:, :, None].mT
            if self.group == "sum":
                score = _probabilities(score.masked_fill(behind < 0, -torch.inf), site)
        score = score.sum(2, keepdim=True) if self.group == "sum" else score
        score = score.masked_fill(behind < 0, -torch.inf)
        if self.force_current:
            score = score.masked_fill(behind == 0, torch.inf)
        return score


def _probabilities(score: Float[Tensor, "b g s q k"], site: Site) -> Float[Tensor, "b g s q k"]:
    logits = score * site.scale
    if site.softcap is not None:
        logits = site.softcap * torch.tanh(logits / site.softcap)
    return logits.softmax(-1)


def _best(score: Float[Tensor, "b g s q k"], counts: list[int], site: Site) -> Int[Tensor, "b h q m"]:
    """The best `counts` keys of each query, -1 behind them."""
    return ops.topk_rows(score, counts).expand(-1, -1, site.group, -1, -1).flatten(1, 2)


def best_keys(q: Float[Tensor, "b h n d"], k: Float[Tensor, "b g n d"]) -> Bool[Tensor, "b h w n"]:
    """Which keys are the best sixteenth of each of the last queries, by q . k."""
    n, first = k.shape[2], max(0, k.shape[2] - QUERIES)
    grouped = q[:, :, first:].float().unflatten(1, (k.shape[1], -1))
    score = (grouped @ k[:, :, None].float().mT).flatten(1, 2)
    at = torch.arange(n, device=q.device)
    score = score.masked_fill(at > at[first:, None], -torch.inf)
    top = score.topk(max(1, min(first + 1, n // SHARE)), -1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, top, True)


def best_layer(recall: Float[Tensor, "layers layers"], first: int) -> int | None:
    """The layer behind `first` that makes `reused` largest if it chooses anew; None where there is no room for one."""
    layers = range(first + 1, len(recall) - 1)
    return max(layers, key=lambda again: float(reused(recall, first, again).sum()), default=None)


def reused(recall: Float[Tensor, "layers layers"], first: int, again: int | None) -> Float[Tensor, " behind"]:
    """Of each layer behind `first`: the share of its best keys that it reads; all in the layer that chooses anew."""
    chosen = recall[first, first + 1 :].clone()
    if again is not None:
        chosen[again - first :] = recall[again, again + 1 :]
        chosen[again - first - 1] = 1.0
    return chosen
