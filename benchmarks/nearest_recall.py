"""How many keys an index must visit to find those that a query wants, on a model's own queries and keys.

    PYTHONPATH=src python benchmarks/nearest_recall.py --json benchmarks/results/FILE.json

One text of Moby-Dick is read by SmolLM2-135M. In some layers the keys between the first 128 and the last 512 are
indexed for every key/value head: "graph" from the queries of the 1,024 tokens before the last 64, "hnsw" and "ivf" by
faiss from the keys alone. The queries of the last 64 tokens search for their best keys, with more and more effort.
Printed for each layer: share of the keys visited at some recalls (a straight line between two efforts), how far queries
lie from the keys (Mahalanobis, over that of keys), and seconds of building. `--json` stores all points.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from saccade import models, ops, tasks
from saccade.attach.calibration import Subject
from saccade.claims import retrieval_attention as claim
from saccade.measure.environment import environment

RECALLS = (0.8, 0.9, 0.95)
KINDS = ("graph", "hnsw", "ivf")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(2, 30, 5)))
    parser.add_argument("--count", type=int, default=100, help="best keys that are searched for")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def build_seconds(heads: claim.Heads) -> dict[str, float]:
    """Of each index, all heads of a layer."""
    out = {}
    for kind in KINDS:
        start = time.perf_counter()
        ops.index_keys(heads.keys, heads.before, kind)
        out[kind] = time.perf_counter() - start
    return out


def line(row: dict[str, Any]) -> str:
    """One layer, to print."""
    shares = "  ".join(f"{kind:5} " + " ".join(f"{x:6.3f}" for x in row["visited"][kind]) for kind in KINDS)
    apart = " ".join(f"{x:5.2f}" for x in row["distance"])
    return f"{row['layer']:5}  {shares}  distance {apart}"


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = models.load("smollm2")
    (sample,) = tasks.get("continuation-loss").samples(tokenizer, args.tokens, 1, 0)
    ids = torch.cat([sample.context, sample.continuation], 1)
    rows, points = [], []
    print(f"share of keys visited at recall@{args.count} of {', '.join(map(str, RECALLS))}; {ids.shape[1]} tokens")
    for heads in claim.layers_of(Subject(model), ids, args.layers):
        found = claim.curve(heads, args.count)
        visited = {k: [claim.share_at(found, heads.layer, k, r) for r in RECALLS] for k in KINDS}
        row = {"layer": heads.layer, "keys": heads.keys.shape[1], "visited": visited}
        rows.append(row | {"distance": claim.distances(heads), "build_seconds": build_seconds(heads)})
        points += found
        print(line(rows[-1]), flush=True)
    mean = {k: [sum(r["visited"][k][i] for r in rows) / len(rows) for i in range(len(RECALLS))] for k in KINDS}
    print(" mean  " + "  ".join(f"{kind:5} " + " ".join(f"{x:6.3f}" for x in mean[kind]) for kind in KINDS))
    if args.json:
        here = environment() | {"faiss": version("faiss-cpu"), "date": datetime.date.today().isoformat()}
        what = {"tokens": args.tokens, "count": args.count, "recalls": RECALLS, "environment": here}
        args.json.write_text(json.dumps(what | {"mean": mean, "layers": rows, "points": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
