"""How fast `saccade serve` answers many at once: real servers, asked by OpenAI's own client.

    PYTHONPATH=src python benchmarks/serve_load.py --json benchmarks/results/serve_load-MACHINE-DATE.json
    python benchmarks/serve_load.py --show benchmarks/results/serve_load-MACHINE-DATE.json

Every method is served in four ways: requests one after the other; together, with whole prompts read between two steps;
together, with prompts in pieces; and so, with the beginnings of prompts kept. The requests are the same: some whose
prompts begin alike, and a long one that comes while they are answered. Printed are, for each way, written tokens a
second, the time to the first token and between two tokens (median and 95th of a hundred; in brackets of the others
while the long prompt was there), that of the long request, prompt tokens that were not read again, and how many answers
are those of one at a time. Times are the client's, which runs on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

WAYS = {
    "one at a time": ("--prefixes", "0"),
    "together, whole prompts": ("--prefixes", "0", "--prefill-chunk", "0"),
    "together, in pieces": ("--prefixes", "0"),
    "together, in pieces, beginnings kept": (),
}
HEAD = "| method | requests | tokens/s | first token, s | between tokens, s | while the long prompt is read, s |" \
       " long: first token, s | prompt tokens kept | same answers |"  # fmt: skip


@dataclass
class Told:
    """What one client saw. Times are seconds on the client's clock, one for each piece of text."""

    long: bool
    asked: float = 0.0
    came: list[float] = field(default_factory=list)
    tokens: int = 0
    kept: int = 0
    text: str = ""


class Server:
    """`saccade serve` on a free port, in a process of its own."""

    def __init__(self, *options: str):
        command = [sys.executable, "-m", "saccade", "serve", "--port", "0", "--name", "served", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        said: list[str] = []
        while not any("http://" in line for line in said):
            line = self.process.stderr.readline()
            if not line:
                raise RuntimeError("the server did not start: " + "".join(said))
            said.append(line)
        self.url = next(word for word in said[-1].split() if word.startswith("http://"))

    def __enter__(self) -> Server:
        health = self.url.removesuffix("v1") + "health"
        for _ in range(600):
            try:
                urllib.request.urlopen(health, timeout=60).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"{health} does not answer")

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", default=["full", "snapkv"])
    parser.add_argument("--budget", default="0.25")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--alike", type=int, default=128, help="prompt tokens that all but the long request begin with")
    parser.add_argument("--own", type=int, default=64, help="prompt tokens after them")
    parser.add_argument("--long", type=int, default=1536, help="prompt tokens of the long request")
    parser.add_argument("--new", type=int, default=32, help="tokens that each request asks for")
    parser.add_argument("--chunk", type=int, default=128, help="--prefill-chunk of the server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store what was measured")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print what was stored, measure nothing")
    return parser.parse_args()


def prompts(args: argparse.Namespace) -> list[list[int]]:
    """Token ids: one for each client, and the long one last."""
    from saccade import models
    from saccade.tasks._text import whole

    text = list(whole(models.load(args.model)[1]))
    begin, rest = text[: args.alike], text[args.alike :]
    own = [begin + rest[i * args.own : (i + 1) * args.own] for i in range(args.clients)]
    return [*own, rest[args.clients * args.own :][: args.long]]


async def ask(client: Any, told: Told, prompt: list[int], new: int) -> None:
    """One streamed request."""
    told.asked = time.perf_counter()
    given = {"model": "served", "prompt": prompt, "max_tokens": new, "temperature": 0}
    stream = await client.completions.create(**given, stream=True, stream_options={"include_usage": True})
    async for piece in stream:
        if piece.choices and piece.choices[0].text:
            told.came.append(time.perf_counter())
            told.text += piece.choices[0].text
        if piece.usage:
            told.tokens = piece.usage.completion_tokens
            told.kept = piece.usage.prompt_tokens_details.cached_tokens


async def drive(url: str, asked: Sequence[list[int]], new: int, together: bool) -> list[Told]:
    """All requests; together, the long one comes as soon as every other has begun to be answered."""
    import openai

    told = [Told(long=prompt is asked[-1]) for prompt in asked]
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=3600) as client:
        await ask(client, Told(long=False), asked[-1][16:32], 2)  # warms up; nobody's prompt begins so
        if not together:
            for one, prompt in zip(told, asked):
                await ask(client, one, prompt, new)
            return told
        running = [asyncio.create_task(ask(client, *both, new)) for both in zip(told[:-1], asked)]
        while not all(one.came for one in told[:-1]) and not any(task.done() for task in running):
            await asyncio.sleep(0.001)
        await asyncio.gather(*running, ask(client, told[-1], asked[-1], new))
    return told


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and 95th of a hundred."""
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else float("nan")
    return {"median": statistics.median(ordered) if ordered else float("nan"), "p95": last}


def summary(told: Sequence[Told], answers: Sequence[str]) -> dict[str, Any]:
    """Of all requests of one way, against the answers of one at a time."""
    short, (long,) = [t for t in told if not t.long], [t for t in told if t.long]
    gaps = [(a, b - a) for t in short for a, b in zip(t.came, t.came[1:])]
    meanwhile = [gap for at, gap in gaps if long.asked < at + gap and at < long.came[0]]
    wall = max(t.came[-1] for t in told) - min(t.asked for t in told)
    return {
        "tokens_per_second": sum(t.tokens for t in told) / wall,
        "seconds": wall,
        "first": spread([t.came[0] - t.asked for t in short]),
        "between": spread([gap for _, gap in gaps]),
        "meanwhile": spread(meanwhile) | {"most": max(meanwhile, default=float("nan")), "count": len(meanwhile)},
        "long_first": long.came[0] - long.asked,
        "kept": sum(t.kept for t in told),
        "same": sum(t.text == answer for t, answer in zip(told, answers)),
        "requests": len(told),
        "told": [asdict(t) for t in told],
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method and way."""
    rows, asked = [], prompts(args)
    common = ("--model", args.model, "--device", args.device, "--dtype", args.dtype, "--budget", args.budget)
    for method in args.methods:
        answers: list[str] = []
        for way, options in WAYS.items():
            chunk = () if "--prefill-chunk" in options else ("--prefill-chunk", str(args.chunk))
            with Server(*common, "--method", method, *chunk, *options) as server:
                told = asyncio.run(drive(server.url, asked, args.new, together=bool(answers)))
            answers = answers or [t.text for t in told]
            rows.append({"method": method, "way": way, **summary(told, answers)})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    first, between = (f"{row[name]['median']:.2f} / {row[name]['p95']:.2f}" for name in ("first", "between"))
    while_read = row["meanwhile"]
    most = f"{while_read['median']:.2f}, at most {while_read['most']:.2f}" if while_read["count"] else "–"
    return (
        f"| `{row['method']}` | {row['way']} | {row['tokens_per_second']:.1f} | {first} | {between} | {most}"
        f" | {row['long_first']:.1f} | {row['kept']} | {row['same']} of {row['requests']} |"
    )


def table(found: dict[str, Any]) -> str:
    """Markdown, with what was asked and where."""
    here, asked = found["environment"], found["asked"]
    said = (
        f"{asked['model']}, {asked['dtype']}, budget {asked['budget']}: {asked['clients']} requests of"
        f" {asked['alike'] + asked['own']} prompt tokens, {asked['alike']} of them alike, and one of {asked['long']};"
        f" {asked['new']} tokens each; pieces of {asked['chunk']}. {here['device_name']}, {here['threads']} threads,"
        f" torch {here['torch']}, {found['date']}."
    )
    ruler = "| --- " * (HEAD.count("|") - 1) + "|"
    return "\n".join([HEAD, ruler, *map(line, found["rows"]), "", said])


def main() -> None:
    args = arguments()
    if args.show:
        print(table(json.loads(args.show.read_text("utf-8"))))
        return
    from saccade.measure.environment import environment

    asked = {name: value for name, value in vars(args).items() if name not in ("json", "show")}
    found = {"asked": asked, "environment": environment(args.device), "date": time.strftime("%Y-%m-%d")}
    found["rows"] = measure(args)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print("\n" + table(found))


if __name__ == "__main__":
    main()
