"""How fast `saccade serve` answers many at once: real servers, asked by OpenAI's own client.

    PYTHONPATH=src python benchmarks/serve_load.py --json benchmarks/results/serve_load-MACHINE-DATE.json
    python benchmarks/serve_load.py --show benchmarks/results/serve_load-MACHINE-DATE.json

Every method is asked in four ways: one request after the other; together, with whole prompts read between two steps;
together, with prompts in pieces; and so, with the beginnings of prompts kept. Every round has other texts and takes all
ways one after the other, so that a slow minute hits them all; servers that wait take no time. The requests of a round
are the same in all ways: some whose prompts begin alike, and a long one that comes once all others are being answered.
Printed are, for each way, written tokens a second; seconds to the first token and between two tokens, median and 95th
of a hundred, of the short requests; the same while the long prompt was read; the long one's first token; prompt tokens
that were not read again; and how many answers are those of one at a time. Times are the client's, on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SERVERS = {  # the options of each
    "whole": ("--prefixes", "0", "--prefill-chunk", "0"),
    "pieces": ("--prefixes", "0"),
    "kept": (),
}
WAYS = {  # which server, and whether all ask at once
    "one at a time": ("pieces", False),
    "together, whole prompts": ("whole", True),
    "together, in pieces": ("pieces", True),
    "together, in pieces, beginnings kept": ("kept", True),
}
HEAD = (
    "| method | requests | tokens/s | first token, s | between tokens, s | between, while the long prompt is read, s"
    " | long: first token, s | prompt tokens kept | same answers |"
)


@dataclass
class Told:
    """What one client saw. Times are seconds on the client's clock, one for each piece of text."""

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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=128, help="--prefill-chunk of the server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store what was measured")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print what was stored, measure nothing")
    return parser.parse_args()


def prompts(args: argparse.Namespace, number: int) -> list[list[int]]:
    """Token ids of a round: one for each client, and the long one last."""
    from saccade import models
    from saccade.tasks._text import whole

    sizes = [args.alike, *[args.own] * args.clients, args.long]
    text = iter(whole(models.load(args.model)[1])[number * sum(sizes) :])
    begin, *own, long = [list(itertools.islice(text, size)) for size in sizes]
    return [*(begin + some for some in own), long]


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

    told = [Told() for _ in asked]
    async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=3600) as client:
        await ask(client, Told(), asked[-1][16:32], 2)  # warms up; nobody's prompt begins so
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
    """Median and 95th of a hundred, and of how many."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    last = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"median": statistics.median(ordered), "p95": last, "count": len(ordered)}


def summary(rounds: Sequence[Sequence[Told]], answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Of one way: what all requests of each round were told, against the answers of one at a time."""
    first, between, meanwhile = [], [], []
    for *short, long in rounds:
        first += [t.came[0] - t.asked for t in short]
        gaps = [(a, b) for t in short for a, b in zip(t.came, t.came[1:])]
        between += [b - a for a, b in gaps]
        meanwhile += [b - a for a, b in gaps if long.asked < b and a < long.came[0]]
    every = [t for told in rounds for t in told]
    wall = sum(max(t.came[-1] for t in told) - min(t.asked for t in told) for told in rounds)
    return {
        "tokens_per_second": sum(t.tokens for t in every) / wall,
        "first": spread(first),
        "between": spread(between),
        "meanwhile": spread(meanwhile),
        "long_first": statistics.median(told[-1].came[0] - told[-1].asked for told in rounds),
        "kept": sum(t.kept for t in every),
        "same": sum(t.text == answer for t, answer in zip(every, itertools.chain(*answers))),
        "requests": len(every),
        "told": [[asdict(t) for t in told] for told in rounds],
    }


def measure(args: argparse.Namespace, method: str) -> Iterator[list[dict[str, Any]]]:
    """A row for each way, anew after every round."""
    common = ["--model", args.model, "--device", args.device, "--dtype", args.dtype, "--budget", args.budget]
    found: dict[str, list[list[Told]]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        given = [*common, "--method", method]
        servers = {name: stack.enter_context(Server(*given, *_chunked(options, args.chunk)))
                   for name, options in SERVERS.items()}  # fmt: skip
        for number in range(args.rounds):
            asked = prompts(args, number)
            for way, (name, together) in WAYS.items():
                found[way].append(asyncio.run(drive(servers[name].url, asked, args.new, together)))
            answers = [[t.text for t in told] for told in found["one at a time"]]
            yield [{"method": method, "way": way, **summary(rounds, answers)} for way, rounds in found.items()]


def _chunked(options: Sequence[str], tokens: int) -> list[str]:
    """With that size of pieces where none is said."""
    return [*options, *([] if "--prefill-chunk" in options else ["--prefill-chunk", str(tokens)])]


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    some = [row[name] for name in ("first", "between", "meanwhile")]
    first, between, meanwhile = (f"{x['median']:.2f} / {x['p95']:.2f}" if x["count"] else "–" for x in some)
    return (
        f"| `{row['method']}` | {row['way']} | {row['tokens_per_second']:.1f} | {first} | {between} | {meanwhile}"
        f" | {row['long_first']:.1f} | {row['kept']} | {row['same']} of {row['requests']} |"
    )


def table(found: dict[str, Any]) -> str:
    """Markdown, with what was asked and where."""
    here, asked = found["environment"], found["asked"]
    said = (
        f"{asked['model']}, {asked['dtype']}, budget {asked['budget']}: {asked['clients']} requests of"
        f" {asked['alike'] + asked['own']} prompt tokens, {asked['alike']} of them alike, and one of {asked['long']};"
        f" {asked['new']} tokens each; pieces of {asked['chunk']}; rounds:"
        f" {', '.join(str(len(row['told'])) for row in found['rows'][:: len(WAYS)])}. {here['device_name']},"
        f" threads: {here['threads']}, torch {here['torch']}, {found['date']}."
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
    done: list[dict[str, Any]] = []
    for method in args.methods:
        for rows in measure(args, method):
            found["rows"] = [*done, *rows]
            print(table(found), end="\n\n", flush=True)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        done = found["rows"]


if __name__ == "__main__":
    main()
