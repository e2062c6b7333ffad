"""What `saccade plan` reckons with, out of the stored results of an H200: src/saccade/data/scale-h200.json.

    python benchmarks/scale.py            # write it anew
    python benchmarks/scale.py --check    # write nothing; end with 1 where it is not up to date

Points are copied or divided (seconds of a layer); nothing is fitted here, and no GPU is needed. Where several files
measured the same, the later counts, as in gpu.py.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from gpu import day

HERE = Path(__file__).resolve().parent
RESULTS, DATA = HERE / "results", HERE.parent / "src" / "saccade" / "data" / "scale-h200.json"
MODELS, ATTEND, DECODE = "gpu_model-*-h200-*.json", "gpu_attend-h200-*.json", "gpu_decode-h200-*.json"
LINEAR = "linear-fla-h200-*.jsonl"  # flash-linear-attention, which is not ours
SHAPE = {"layers": "num_hidden_layers", "hidden": "hidden_size", "intermediate": "intermediate_size",
         "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_size": "head_dim",
         "vocabulary": "vocab_size"}  # fmt: skip
UNIT = 1e-6  # results say microseconds


def read(pattern: str) -> list[tuple[str, Any]]:
    """(file name, content) of all that match, oldest first."""
    found = sorted(RESULTS.glob(pattern), key=lambda p: (day(p), p.name))
    return [(p.name, json.loads(p.read_text("utf-8"))) for p in found]


def rows(part: str) -> list[tuple[str, dict[str, Any]]]:
    """(file name, row) of whole-model results."""
    return [(name, row) for name, data in read(MODELS) for row in data["rows"] if row["part"] == part]


def prefill() -> dict[str, list[dict[str, Any]]]:
    """method -> seconds of attention of one layer at each length; of dense the fastest kernel there is."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, row in rows("prefill"):
        figures = {key: statistics.median(values) / row["layers"] for key, values in row["figures"].items()}
        if row["method"] == "dense kernels":
            method, (kernel, seconds) = "full", min(figures.items(), key=lambda item: item[1])
        else:
            method, kernel, seconds = row["method"], "", figures["attention"]
        if method == "full" and not kernel:
            continue  # transformers' own, which is in the run of dense kernels too
        before = found.setdefault(method, {}).get(row["tokens"])
        if method == "full" and before and before["seconds"] < seconds:
            continue
        point = {"tokens": row["tokens"], "seconds": seconds, "budget": row["budget"], "from": name}
        found[method][row["tokens"]] = point | ({"kernel": kernel} if kernel else {})
    found.pop("full:attached")  # the library's own dense, which is not the fastest
    return {method: [points[n] for n in sorted(points)] for method, points in found.items()}


def beside() -> list[dict[str, Any]]:
    """Of the model alone, one layer's kernels that are not attention: seconds of its products, and of all the rest."""
    found = []
    for name, row in rows("prefill"):
        if row["method"] == "full" and row["kernels"]:
            spent = {key: row["kernels"][key] / 1e3 / row["layers"] for key in ("matrix products", "attention", "all")}
            rest = spent["all"] - spent["attention"] - spent["matrix products"]
            point = {"tokens": row["tokens"], "products": spent["matrix products"], "rest": rest}
            found.append(point | {"layers": row["layers"], "from": name})
    return found


def whole() -> list[dict[str, Any]]:
    """Of whole prefills, to test the model against: nothing is reckoned with these."""
    found = {}
    for name, row in rows("prefill"):
        if row["method"] != "dense kernels":
            size = {key: row[key] for key in ("method", "tokens", "layers")}
            found[(*size.values(),)] = size | {"seconds": statistics.median(row["figures"]["seconds"]), "from": name}
    return [found[size] for size in sorted(found)]


def decode() -> dict[str, list[dict[str, Any]]]:
    """method -> one layer's seconds of a step as a CUDA graph, and its cache beside that of `full`."""
    found: dict[str, dict[tuple[int, int], dict[str, Any]]] = {}
    dense = [row for _, row in rows("decode") if row["method"] == "full"]
    held = {(row["tokens"], row["batch"]): row["bytes"]["cache"] for row in dense}
    for name, row in rows("decode"):
        figures, where = row["figures"], (row["tokens"], row["batch"])
        if "graph" not in figures or where not in held:
            continue  # what asks the host in every step, and what was not measured beside the model alone
        spent = statistics.median(figures["graph"]) - statistics.median(figures["rest"])
        point = {"tokens": row["tokens"], "batch": row["batch"], "seconds": spent / row["layers"]}
        point |= {"cache": row["bytes"]["cache"] / held[where], "budget": row["budget"], "from": name}
        found.setdefault(row["method"], {})[where] = point
    return {method: [points[w] for w in sorted(points)] for method, points in found.items()}


def blocks() -> list[dict[str, Any]]:
    """Own kernel over blocks of 128, forward, at the longest length: pairs computed and their operations a second."""
    found = []
    for name, data in read(ATTEND):
        for row in data["rows"]:
            if re.fullmatch(r"blocks 128 [\d.]+|sinks 4 \+ window 4096", row["case"]) and row["tokens"] == 131072:
                speed = row["triton"]["tflops"] * 1e12
                found.append({"case": row["case"], "density": row["density"], "flops": speed, "from": name})
    return found


def choosing() -> dict[str, Any]:
    """Pooling queries, and scoring and ranking the blocks of all keys, of one layer of 131,072 tokens."""
    case = "choose 64 of 1024 blocks of 128"
    name, data = next(file for file in read(DECODE) if any(row["row"] == case for row in file[1]["rows"]))
    took = {(row["row"], row["by"]): row["microseconds"] * UNIT for row in data["rows"] if row["microseconds"]}
    return {"tokens": 1024 * 128, "block": 128, "seconds": took[case, "triton"],
            "pooling_queries": took[case, "pooling q alone, 2 warps"], "from": name}  # fmt: skip


def linear() -> list[dict[str, Any]]:
    """Lightning attention, forward, of one layer (flash-linear-attention)."""
    found = []
    for path in sorted(RESULTS.glob(LINEAR)):
        for line in map(json.loads, path.read_text("utf-8").splitlines()):
            if "lightning" in line["name"]:
                found.append({"tokens": line["n"], "seconds": line["ms"] / 1e3, "from": path.name})
    return found


def made() -> str:
    """The whole file."""
    name, first = read(MODELS)[0]
    copied, data = read(DECODE)[0]
    everything = {
        "made_by": "python benchmarks/scale.py, from benchmarks/results",
        "device": first["environment"]["device_name"],
        "shape": {ours: first["shape"][theirs] for ours, theirs in SHAPE.items()} | {"from": name},
        "copy": {"bytes_per_second": data["copy"], "from": copied},
        "prefill": prefill(),
        "beside": beside(),
        "whole": whole(),
        "decode": decode(),
        "blocks": blocks(),
        "choosing": choosing(),
        "linear": linear(),
    }
    return json.dumps(everything, indent=1) + "\n"


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it is not up to date")
    text, given = made(), parser.parse_args()
    same = DATA.is_file() and DATA.read_text("utf-8") == text
    if not same and not given.check:
        DATA.write_text(text, "utf-8")
    print(f"{DATA.name} is {'up to date' if same else 'not up to date' if given.check else 'written'}")
    return 1 if given.check and not same else 0


if __name__ == "__main__":
    sys.exit(main())
