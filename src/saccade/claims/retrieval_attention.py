"""RetrievalAttention: an index built from queries finds the keys of later queries while looking at few."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saccade import ops
from saccade.attach.calibration import Subject
from saccade.claims._bench import Bench, Progress, at_least, at_most, machinery
from saccade.claims._contract import Claim, Evidence
from saccade.measure.stats import mean_interval
from saccade.methods.decode.retrieval_attention import RetrievalAttention
from saccade.tasks._base import Sample

CLAIM = Claim(
    says="Queries lie outside the distribution of the keys, so that indexes over keys must scan 30 % and more of them;"
    " a graph built from the queries of the prompt finds 95 % of the best keys in 1 to 3 %, and quality stays near"
    " full attention.",
    where="arXiv 2409.10516, sections 2.3, 3 and 4 (recall against scanned keys, distance of queries to keys, tables of"
    " infinity-Bench and RULER)",
    setting="Llama-3-8B-262K and others, 128k tokens, 640 keys on the device and 100 or 2,000 retrieved; RTX 4090",
    how="SmolLM2-135M. On one text of 4,096 tokens, every fifth layer, all heads: the keys between the first 128 and"
    " last 512 are indexed with the 1,024 last queries before the last 64 tokens, whose queries then search for their"
    " best 32 keys: share of keys visited at which a graph from queries, HNSW and IVF over keys first find 90 % of them"
    " (mean over queries; centroids not counted). Mahalanobis distance of queries to the keys, over that of the keys."
    " Pass keys in 1,024 tokens, and loss of 64 tokens after 1,536, reading 112 keys (16 first, 56 newest, 40"
    " searched for), against full attention, sinks and window, random keys and an exact search, as many reads each."
    " Thirty times fewer keys than the paper's, of which a search must look at more: scaled down.",
    tiers=("smoke", "cpu", "gpu"),
    counts="The graph visits at most half of what HNSW does, and a third of what IVF does, for the same recall; median"
    " distance of queries at least twice that of keys in most heads; pass keys within 5 points of full attention, and"
    " 50 points above sinks and window; loss within 0.02 nats of full attention, and of the exact search.",
)
LONG = 4096  # tokens of the text whose keys are indexed
HELD_OUT = 64  # last tokens of a text, whose queries search
SINKS, WINDOW = 128, 512  # not indexed
BUILDING = 1024  # queries that build, of each head
RECALL = 0.9
SWEEP = {  # beams and probes
    "graph": (16, 32, 64, 128, 256, 512),
    "hnsw": (16, 32, 64, 128, 256, 512, 1024, 2048),
    "ivf": (1, 2, 4, 8, 16, 32, 64, 128, 256),
}
READ = "112tok"
OURS = "retrieval-attention:sink_tokens=16,window_tokens=64"
SCORED = 64  # tokens of a loss


class Heads(NamedTuple):
    """Of one layer: keys that are indexed, queries before, and later ones, which search."""

    layer: int
    keys: Float[Tensor, "g n d"]
    before: Float[Tensor, "g m d"]
    after: Float[Tensor, "g s d"]


def measure(tier: str, progress: Progress | None = None) -> Evidence:
    """Evidence of a tier: "smoke", "cpu" or "gpu"."""
    if tier == "smoke":
        return machinery(RetrievalAttention(sink_tokens=4, window_tokens=8, beam_keys=4))
    text, keys = _texts(tier, progress)
    layers = list(layers_of(Subject(text.model), _long(text), range(2, 30, 5)))
    curves = [row for heads in layers for row in curve(heads, 32)]
    need = {kind: [share_at(curves, h.layer, kind, RECALL) for h in layers] for kind in ("graph", "hnsw", "ivf")}
    apart = [ratio for heads in layers for ratio in distances(heads)]
    full, ours = text.scores("full"), text.scores(OURS, READ)
    exact = text.scores(f"{OURS},search=flat", READ)
    for bench in (text, keys):
        for baseline in ("streaming", "random:part=decode"):
            bench.scores(baseline, READ)
    found = keys.scores(OURS, READ)
    checks = [
        at_most("visited minus half of HNSW's, at 90 % recall", _less(need, "hnsw", 2), 0.0),
        at_most("visited minus a third of IVF's, at 90 % recall", _less(need, "ivf", 3), 0.0),
        at_least("heads whose queries are twice as far from the keys", mean_interval([r >= 2 for r in apart]), 0.5),
        at_least("pass keys minus full", keys.difference(found, keys.scores("full")), -0.05),
        at_least("pass keys minus sinks and window", keys.difference(found, keys.scores("streaming", READ)), 0.5),
        at_most("minus full, nats", text.difference(ours, full), 0.02),
        at_most("minus the exact search, nats", text.difference(ours, exact), 0.02),
    ]
    lost = text.difference(exact, full).mean
    shares = ", ".join(f"{kind} {sum(v) / len(v):.3f}" for kind, v in need.items())
    reason = f"Keys visited at {RECALL} recall: {shares}. The exact search of as many keys loses {lost:+.3f} nats."
    setting = (
        f"{text.where()}; recall in {len(layers)} layers of {LONG:,} tokens; {keys.what()}, and {text.count} losses of"
        f" {SCORED} tokens after {text.samples[0].context.shape[1]:,}; {READ} read of each"
    )
    return Evidence(checks, setting, reason, table=text.rows() + keys.rows() + means(curves))


def _texts(tier: str, progress: Progress | None) -> tuple[Bench, Bench]:
    """Texts for losses, of which only some tokens are scored, and pass keys."""
    text = Bench("continuation-loss", (2048,), 2, progress, tier=tier)
    text.samples = [_shorter(sample) for sample in text.samples]
    return text, Bench("passkey", (1024,), 6, progress, (text.model, text.tokenizer), tier)


def _shorter(sample: Sample) -> Sample:
    return dataclasses.replace(sample, continuation=sample.continuation[:, :SCORED], scored=slice(0, SCORED))


def _long(text: Bench) -> Tensor:
    """The text whose keys are indexed, as the task makes it."""
    (sample,) = text.task.samples(text.tokenizer, LONG, 1, 0)
    return torch.cat([sample.context, sample.continuation], 1)


def _less(need: dict[str, list[float]], other: str, times: float) -> Any:
    return mean_interval([a - b / times for a, b in zip(need["graph"], need[other])])


# --- recall against keys visited --------------------------------------------------------------------------------------


def layers_of(subject: Subject, ids: Tensor, layers: Sequence[int]) -> Iterator[Heads]:
    """Keys to index and queries of a text [1 n], in some layers; on the CPU, where all indexes can be built."""
    for layer, q, k, _ in subject.capture_qkv([ids]):
        if layer in layers:
            q, k = (x.float().cpu() for x in (q, k))
            grouped = q[0].unflatten(0, (k.shape[1], -1))
            end = k.shape[2] - HELD_OUT
            before, after = grouped[:, :, max(0, end - BUILDING) : end], grouped[:, :, end:]
            keys = k[0, :, SINKS : end - WINDOW].clone()
            yield Heads(layer, keys, before.flatten(1, 2).clone(), after.flatten(1, 2).clone())


@torch.no_grad()
def curve(heads: Heads, count: int) -> list[dict[str, Any]]:
    """A row for each index and effort: recall of the best `count` keys, and the share of keys visited."""
    best = ops.index_keys(heads.keys, heads.before, "flat").search(heads.after, count).index
    pairs, rows = heads.after.shape[:2].numel() * heads.keys.shape[1], []
    for kind, efforts in SWEEP.items():
        index: Any = ops.index_keys(heads.keys, heads.before, kind)
        for effort in efforts:
            if (kind != "ivf" and effort < count) or effort > heads.keys.shape[1]:
                continue
            tried = dataclasses.replace(index, **{"beam" if kind == "graph" else "effort": effort})
            found = tried.search(heads.after, count)
            hit = (found.index[..., None] == best[..., None, :]).any(-1).float().mean()
            row = {"layer": heads.layer, "kind": kind, "effort": effort, "recall": float(hit)}
            rows.append(row | {"visited": found.visited / pairs})
    return rows


def share_at(curves: list[dict[str, Any]], layer: int, kind: str, recall: float) -> float:
    """Share of keys visited where the recall is first reached, between two efforts by a straight line; all keys, where
    it is not."""
    points = [(r["recall"], r["visited"]) for r in curves if r["layer"] == layer and r["kind"] == kind]
    low = (0.0, 0.0)
    for high in [*points, (1.0, 1.0)]:
        if high[0] >= recall:
            return low[1] + (high[1] - low[1]) * (recall - low[0]) / (high[0] - low[0])
        low = high
    raise AssertionError("the last point has recall 1")


def means(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the layers, a row for each index and effort."""
    some: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in curves:
        some.setdefault((row["kind"], row["effort"]), []).append(row)
    return [
        {"who": kind, "effort": effort, "n": len(rows)}
        | {name: sum(r[name] for r in rows) / len(rows) for name in ("recall", "visited")}
        for (kind, effort), rows in some.items()
    ]


def distances(heads: Heads) -> list[float]:
    """Per head: median Mahalanobis distance to the keys' distribution, of later queries over that of the keys."""
    out = []
    for keys, queries in zip(heads.keys.double(), heads.after.double()):
        white = torch.linalg.cholesky(torch.cov(keys.T) + 1e-9 * torch.eye(keys.shape[1]))
        there, here = (_length(x - keys.mean(0), white) for x in (queries, keys))
        out.append(there / here)
    return out


def _length(x: Float[Tensor, "n d"], white: Float[Tensor, "d d"]) -> float:
    return math.sqrt(torch.linalg.solve_triangular(white, x.T, upper=False).square().sum(0).median())
