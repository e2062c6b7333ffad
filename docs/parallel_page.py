"""The generated part of docs/parallel.md: what benchmarks/gpu_parallel.py found on GPUs. Called by docs/make.py."""

from __future__ import annotations

from typing import Any

WAYS = {"one": "alone", "heads": "by heads", "ring": "in a ring"}
Row = list[str]


def equal(check: list[dict[str, Any]]) -> str:
    """One sentence on what was compared with one process."""
    worst = max((x for row in check for x in row.get("apart", {}).values()), default=0.0)
    wrong = [f"{row['who']} {WAYS[row['way']]}" for row in check if not row["equal"]]
    said = f"not the same: {', '.join(wrong)}" if wrong else "all the same"
    return f"{len(check)} comparisons with one process: {said}; losses, logits and gradients {worst:.1e} apart at most."


def table(grow: list[dict[str, Any]]) -> tuple[Row, list[Row]]:
    """Seconds and what a process holds, of each work and length; a way that did not run there is a dash."""
    by = {(r["what"], r["who"], r["tokens"], r["way"]): r for r in grow}
    cases = dict.fromkeys(key[:3] for key in by)
    rows = []
    for what, who, tokens in sorted(cases, key=lambda c: (c[0], c[1], c[2])):
        cells = [by.get((what, who, tokens, way)) for way in WAYS]
        shown = [f"{r['seconds']:.2f} s, {r['held'] / 2**30:.1f} GiB" if r else "–" for r in cells]
        rows.append([what, f"`{who}`", f"{tokens:,}", *shown])
    return ["work", "method", "tokens", *WAYS.values()], rows
