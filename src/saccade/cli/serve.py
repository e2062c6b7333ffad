"""answer HTTP requests in OpenAI's form, with methods attached

POST /v1/chat/completions and /v1/completions, streaming or not; GET /v1/models and /health. Requests that come together
are decoded together. It listens on this machine alone, unless told otherwise. Needs the extra: saccade[serve].
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from saccade.cli.console import note
from saccade.cli.options import METHOD, add_budget, add_model, budget, load, model_name
from saccade.core.errors import BadOption

EXAMPLE = "saccade serve --method minference --method snapkv --budget 0.25 --port 8000"
KEY = "SACCADE_API_KEY"
CLOSING_SECONDS = 5  # for running answers, once it is told to stop
AFTER_INTERRUPT = f"Answers that took longer than {CLOSING_SECONDS} s were cut off."


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` takes."""
    parser.add_argument(
        "--method", action="append", metavar="METHOD", help=f"{METHOD}; may be given again for another part (full)"
    )
    add_budget(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    parser.add_argument("--api-key", metavar="KEY", help=f"what clients must send; better in the environment: {KEY}")
    parser.add_argument("--allow-no-key", action="store_true", help="let everyone who reaches the address use it")
    parser.add_argument("--name", help="what clients call the model (as --model says)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="decode so many together (16)")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="let so many wait; more are told 429 (64)")
    parser.add_argument("--cache", default="4GiB", metavar="BYTES", help="for the caches of all requests (4GiB)")
    parser.add_argument("--prefixes", type=int, default=8, metavar="N", help="keep the caches of N prompts (8)")
    parser.add_argument(
        "--prefill-chunk", type=int, default=512, metavar="N",
        help="read N tokens of prompts between two steps of the others; 0: whole prompts (512)",
    )  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="for chats that do not say (256)")
    parser.add_argument("--request-tokens", type=int, metavar="N", help="of one request (what the model can take)")
    parser.add_argument("--seed", type=int, default=0, help="of methods that draw (0)")
    add_model(parser)


def run(args: argparse.Namespace) -> int:
    """0 when it is told to stop."""
    from saccade.core.budget import Budget
    from saccade.engines.serve import address
    from saccade.engines.serve.service import Limits, Service
    from saccade.measure.contestants import parse

    key = os.environ.get(KEY) if args.api_key is None else args.api_key
    address.check_extra()
    address.check_key(args.host, key, args.allow_no_key)
    who, amount, size = parse("+".join(args.method or ["full"])), budget(args), Budget.of(args.cache)
    if size.unit != "bytes":
        raise BadOption(f"--cache {args.cache}", "that is no number of bytes", "Give one: 2GiB.")
    bounds = (args.batch, args.queue, int(size.amount), args.prefixes, args.new_tokens, args.request_tokens)
    limits = Limits(*bounds, args.prefill_chunk)
    bound, url = address.listen(args.host, args.port)
    with bound:
        model, tokenizer = load(args)
        with Service(model, tokenizer, who, amount, limits, args.seed) as service:
            _listen(args, service, key, bound, url)
    return 0


def _listen(args: argparse.Namespace, service, key: str | None, bound, url: str) -> None:
    import uvicorn

    from saccade.engines.serve.app import make_app
    from saccade.engines.serve.reader import chat_note

    app = make_app(service, _name(args), key=key, any_host=args.allow_no_key)
    level = "info" if args.verbose else "warning"
    config = uvicorn.Config(app, log_level=level, timeout_graceful_shutdown=CLOSING_SECONDS, server_header=False)
    needed = "clients need the API key" if key else "no key is needed"
    note(f"{_name(args)} with {service.who.label} at budget {service.health()['budget']}: {url} ({needed})")
    for line in filter(None, [chat_note(service.tokenizer), *service.notes()]):
        note(line)
    uvicorn.Server(config).run(sockets=[bound])


def _name(args: argparse.Namespace) -> str:
    given = model_name(args)
    return args.name or (Path(given).resolve().name if Path(given).exists() else given)
