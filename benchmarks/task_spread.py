"""What dense attention scores on every task, and how far methods scatter around it: where `Task.spread` comes from.

    PYTHONPATH=src python benchmarks/task_spread.py --tokens 256 512 1024 2048 --count 40

A line for each task, length and method: score of `full` with its 95 % interval, for hits also by depth; for the methods
the mean paired difference and its standard deviation. `spread` in a task's file is the largest of these deviations at
512 tokens, rounded up. `--device cuda` makes minutes of what takes two CPU cores an hour.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

from saccade import models, tasks
from saccade.attach import fingerprint
from saccade.core.budget import Budget
from saccade.measure.contestants import parse
from saccade.measure.score import Subject, quality
from saccade.measure.stats import hit_rate, mean_interval, paired

METHODS = ("snapkv", "knorm", "streaming", "minference")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", default=tasks.list_tasks())
    parser.add_argument("--tokens", nargs="+", type=int, default=[512])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def measure(subject: Subject, spec: str, budget: str, task: tasks.Task, samples: list[tasks.Sample]) -> list[dict]:
    who = parse(spec).equipped(fingerprint(subject.model))
    return quality(subject, who, Budget.of(budget), task, samples, 0)["samples"]


def depths(outcomes: list[dict]) -> str:
    """Hits out of samples at each depth; nothing where there are no depths."""
    by: dict[float, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if "depth" in outcome["facts"]:
            by[outcome["facts"]["depth"]].append(outcome["score"])
    return " ".join(f"{depth}:{sum(hits):.0f}/{len(hits)}" for depth, hits in sorted(by.items()))


def report(subject: Subject, task: tasks.Task, tokens: int, args: argparse.Namespace) -> None:
    samples = task.samples(subject.tokenizer, tokens, args.count, args.seed)
    outcomes = measure(subject, "full", "1.0", task, samples)
    dense = [outcome["score"] for outcome in outcomes]
    e = (hit_rate if task.metric == "hit" else mean_interval)(dense)
    head = f"{task.name:18s} {tokens:5d} tokens, n={e.n}"
    print(f"{head}  full {e.mean:.3f} [{e.low:.3f}, {e.high:.3f}] {depths(outcomes)}", flush=True)
    for spec in args.methods:
        if parse(spec).exercised(task.one_pass):
            scores = [outcome["score"] for outcome in measure(subject, spec, args.budget, task, samples)]
            d = paired(scores, dense, task.metric == "hit")
            said = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}] sd {d.sd:.3f}"
            print(f"{head}  {spec} at {args.budget}: {said}", flush=True)


def main() -> None:
    args = arguments()
    subject = Subject(*models.load(args.model, device=args.device))
    for name in args.tasks:
        for tokens in args.tokens:
            report(subject, tasks.get(name), tokens, args)


if __name__ == "__main__":
    main()
