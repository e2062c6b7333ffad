"""let a method learn what it needs from a model, and keep it where attach finds it

It learns from the shipped text, or from a plain text of yours.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from saccade.cli.console import Bar, note
from saccade.cli.options import METHOD, add_model, load, read_text
from saccade.core.errors import BadInput, BadOption

EXAMPLE = "saccade calibrate minference --model smollm2"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `calibrate` takes."""
    parser.add_argument("method", metavar="METHOD", help=METHOD.split(", or")[0])
    parser.add_argument("--samples", type=int, default=8, help="rows of text (8)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row (512)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="a long plain text (the shipped Moby-Dick)")
    parser.add_argument("--seed", type=int, default=0, help="of the places in the shipped text (0)")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """Prints where the artefact lies."""
    import saccade
    from saccade.core.paths import SHIPPED, cache_dir
    from saccade.measure.contestants import parse

    methods = parse(args.method).methods
    if len(methods) != 1 or min(args.samples, args.tokens) < 1:
        asked = f"calibrate {args.method!r} on {args.samples} rows of {args.tokens} tokens"
        raise BadOption(asked, "that is not one method and some text", "Name one method, and numbers from 1.")
    model, tokenizer = load(args)
    with Bar(args.quiet) as bar:
        artefact = saccade.calibrate(model, methods[0], _rows(args, tokenizer), bar)
    if any(SHIPPED.joinpath(artefact.method).glob(f"{artefact.fingerprint}.*")):
        note("From now on it is used in place of the shipped one; delete it to go back.")
    for name, value in artefact.figures.items():
        note(f"{name}: {value}")
    print(cache_dir("artefacts", artefact.method, artefact.fingerprint).with_suffix(".safetensors"))
    return 0


def _rows(args: argparse.Namespace, tokenizer: Any) -> list[Any]:
    import torch

    from saccade.tasks import passage

    if args.text is None:
        places = range(args.samples)
        return [torch.tensor([passage(tokenizer, args.tokens, i, args.seed)[0]]) for i in places]
    text = read_text(args.text)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False).input_ids], dtype=torch.long)
    rows = [row for row in ids.split(args.tokens, dim=1) if row.shape[1] == args.tokens][: args.samples]
    if len(rows) < args.samples:
        found = f"its {ids.shape[1]:,} tokens make {len(rows)}"
        raise BadInput(f"{args.samples} rows of {args.tokens} tokens from {args.text}", found, "Ask for fewer.")
    return rows
