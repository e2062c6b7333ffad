"""let a model answer with a method attached; the text streams to stdout

The prompt is TEXT, a file, or both: the file first. Models that chat are asked through their chat template.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from saccade.cli.console import note, say_json
from saccade.cli.options import METHOD, add_budget, add_json, add_model, budget, load, model_name, read_text
from saccade.core.errors import BadInput, BadOption

EXAMPLE = 'saccade run --method snapkv --budget 0.25 -f notes.txt "What was decided?"'


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the prompt; - reads it from standard input")
    parser.add_argument("-f", "--file", type=Path, metavar="FILE", help="a text that goes before it")
    parser.add_argument("--method", default="full", metavar="METHOD", help=f"{METHOD} (full)")
    add_budget(parser)
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N", help="write at most so many (128)")
    parser.add_argument("--raw", action="store_true", help="no chat template: go on writing where the prompt ends")
    parser.add_argument("--seed", type=int, default=0, help="of methods that draw (0)")
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Always 0: what cannot run is an error."""
    from saccade.cli.stream import Stream
    from saccade.measure.contestants import parse

    text, who, amount = _prompt(args), parse(args.method), budget(args)
    if args.new_tokens < 1:
        raise BadOption(f"--new-tokens {args.new_tokens}", "nothing is to be written", "Give 1 or more.")
    model, tokenizer = load(args)
    inputs = _encode(text, model, tokenizer, args)
    stream = Stream(tokenizer, (lambda piece: None) if args.json else _write)
    with who.working(model, amount, args.seed) as attached:
        stream.start()
        model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False, streamer=stream)
        record = attached and attached.record
    found = {"model": model_name(args), "method": who.label, "budget": str(amount) if who.methods else "1"}
    found |= stream.figures() | _kept(model, record, stream.prompt_tokens + stream.new_tokens - 1)
    if args.json:
        say_json(found | {"text": stream.text})
    else:
        print()
        note(_line(found))
    return 0


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _prompt(args: argparse.Namespace) -> str:
    parts = [read_text(args.file)] if args.file else []
    if args.text == "-" or (args.text is None and args.file is None and not sys.stdin.isatty()):
        parts.append(sys.stdin.read())
    elif args.text:
        parts.append(args.text)
    text = "\n\n".join(part.strip() for part in parts)
    if not text:
        raise BadInput("run without a prompt", "there is no text", 'Give one: saccade run "...", or -f FILE.')
    return text


def _encode(text: str, model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    if tokenizer.chat_template and not args.raw:
        asked = [{"role": "user", "content": text}]
        inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(text, return_tensors="pt", verbose=False)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = inputs["input_ids"].shape[1]
    if limit and tokens + args.new_tokens > limit:
        found = f"{model_name(args)} was trained for {limit:,}"
        raise BadInput(f"run {tokens:,} tokens and {args.new_tokens} new ones", found, "Give less text.")
    return {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _kept(model: Any, record: Any, tokens: int) -> dict[str, Any]:
    """What the cache held at the end, and what a full one of `tokens` tokens holds."""
    from saccade.core.record import Record
    from saccade.measure.bytes import full_cache_bytes

    full = full_cache_bytes(model, tokens)
    held = full if record is None else record.bytes_held
    record = Record() if record is None else record  # an empty one left nothing out
    found = {"kept_fraction": record.kept_fraction, "bytes_held": held, "bytes_full": full}
    return found | {f"{stage}_density": record.density(stage) for stage in ("prefill", "decode")}


def _line(found: dict[str, Any]) -> str:
    from saccade.report.words import say

    seconds = found["seconds_prefill"] + found["seconds_decode"]
    held, full = (say(found[f"bytes_{which}"], "bytes") for which in ("held", "full"))
    shares = {f"{stage} computed": found[f"{stage}_density"] for stage in ("prefill", "decode")}
    return (
        f"{found['method']}: {found['prompt_tokens']:,} + {found['new_tokens']:,} tokens in {say(seconds, 'seconds')}"
        f" (first after {say(found['seconds_prefill'], 'seconds')}); cache {held} of {full}, kept"
        f" {say(found['kept_fraction'], 'share')}"
        + "".join(f"; {what} {say(share, 'share')} of the pairs" for what, share in shares.items() if share < 1)
    )
