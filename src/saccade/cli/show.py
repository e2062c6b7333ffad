"""all that is known of a method: paper, equation, options, departures, verdict; or a picture of where it looks

Reads the method's source without importing it. With --picture the method reads a text in a model, and a page shows, for
every layer and head, what it chose and where the exact attention lies.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import re
from pathlib import Path
from typing import Any

from saccade.claims._found import latest
from saccade.cli.console import Bar, say_json
from saccade.cli.options import BUDGET, METHOD, add_json, add_model, load, model_name, read_text
from saccade.core import registry
from saccade.core.card import Card
from saccade.core.errors import BadInput, BadOption

EXAMPLE = "saccade show snapkv"
PICTURE_TOKENS = 512  # of the shipped text


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `show` takes."""
    parser.add_argument("name", metavar="NAME", help="a method, as `saccade list` names it")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--bibtex", action="store_true", help="only the entry to cite it by")
    about = f"write a page of what it attends to; NAME may then be {METHOD.removeprefix('NAME, ')}"
    only.add_argument("--picture", type=Path, metavar="FILE.html", help=about)
    parser.add_argument("--budget", metavar="BUDGET", help=f"of a picture, {BUDGET} (0.25; 1 where none is taken)")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", help="of a picture, what is read (512 tokens of Moby-Dick)")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="the same from a file")
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Always 0: what is unknown is an error."""
    if args.picture is not None:
        return _picture(args)
    _check_unpictured(args)
    card = registry.card(args.name)
    if args.bibtex:
        print(bibtex(card))
        return 0
    found = {**dataclasses.asdict(card), "idea": idea(card.name), "options": options(card.name)}
    found |= {"claim": latest(card.name), "bibtex": bibtex(card)}
    if args.json:
        say_json(found)
    else:
        print("\n".join(_lines(card, found)))
    return 0


def _check_unpictured(args: argparse.Namespace) -> None:
    device = None if args.device == "cpu" else args.device  # the default
    given = {name: getattr(args, name) for name in ("budget", "prompt", "prompt_file", "model", "dtype")}
    for name, value in {**given, "device": device}.items():
        if value is not None:
            asked = f"show --{name.replace('_', '-')} {value}"
            raise BadOption(asked, "it is of a picture", "Add --picture FILE.html, or leave it away.")


def _picture(args: argparse.Namespace) -> int:
    """Writes the page, and prints where it lies."""
    from saccade.measure.attended import attended
    from saccade.measure.contestants import parse
    from saccade.report.html import render_attended

    who = parse(args.name)
    budget = args.budget or ("0.25" if who.takes_budget else "1")
    text = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    if text is not None and not text.strip():
        raise BadInput("a picture of a prompt", "there is no text", "Give one, or leave it away.")
    model, tokenizer = load(args)
    ids = _ids(text, tokenizer)
    with Bar(args.quiet) as bar:
        found = attended(model, ids, who, budget, progress=bar)
    name = model_name(args)
    model_said = Path(name).name if Path(name).exists() else name  # of a folder, the last part
    facts = [("Model", model_said), ("Text", "Moby-Dick" if text is None else "a prompt of your own")]
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    args.picture.write_text(render_attended(found, [*facts, ("Tokens", f"{ids.shape[1]:,}")]), encoding="utf-8")
    if args.json:
        shares = [{"queries": s.stage, "density": s.density, "covered": s.covered} for s in found.stretches]
        said = {"method": who.label, "budget": found.budget, "tokens": ids.shape[1], "picture": str(args.picture)}
        say_json(said | {"shares": shares})
    else:
        print(args.picture)
    return 0


def _ids(text: str | None, tokenizer: Any) -> Any:
    """[1 n]: of the text, or of a passage of the shipped one."""
    import torch

    from saccade import tasks

    if text is not None:
        return tokenizer(text, return_tensors="pt", verbose=False).input_ids
    sample = tasks.get("loss").samples(tokenizer, PICTURE_TOKENS, 1, 0)[0]
    return torch.cat([sample.context, sample.continuation], 1)


def options(name: str) -> list[dict[str, str]]:
    """Option, type, default and meaning, in the order they are written."""
    node = registry.source(name)[1]
    lines = re.findall(r"^([a-z_, ]+): (.*(?:\n {2,}.*)*)", ast.get_docstring(node) or "", re.MULTILINE)
    said = {option: about for names, about in lines for option in names.split(", ")}
    return [
        {"option": name, "type": kind, "default": default, "about": " ".join(said.get(name, "").split())}
        for name, kind, default in [*_fields(node), *_keywords(node)]
    ]


def _fields(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """Name, type and default of what is written in the class: options of a method."""
    lines = [line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]
    found = [(x.target.id, ast.unparse(x.annotation), ast.unparse(x.value) if x.value else "") for x in lines]
    return [field for field in found if "ClassVar" not in field[1]]


def _keywords(node: ast.ClassDef) -> list[tuple[str, str, str]]:
    """The same of what its constructor takes by keyword alone: options of a layer."""
    makers = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    pairs = [pair for f in makers for pair in zip(f.args.kwonlyargs, f.args.kw_defaults)]
    return [
        (arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", ast.unparse(value) if value else "")
        for arg, value in pairs
    ]


def idea(name: str) -> str:
    """The paragraphs of the docstring before options, errors and source."""
    text = ast.get_docstring(registry.source(name)[1]) or ""
    return re.split(r"\n\n?(?=[a-z_, ]+: |Raises:|Source:)", text, maxsplit=1)[0]


def bibtex(card: Card) -> str:
    """An entry to cite the paper by; empty for what has none."""
    if not card.paper:
        return ""
    number, (first, *more) = card.paper.removeprefix("arXiv:"), card.authors.split(", ")
    key = re.sub(r"\W", "", first.lower()) + str(card.year)
    names = " and ".join(name if name != "et al." else "others" for name in [first, *more])
    fields = {"title": card.title, "author": names, "year": card.year, "eprint": number, "archivePrefix": "arXiv"}
    return "@misc{%s,\n%s\n}" % (key, ",\n".join(f"  {k} = {{{v}}}" for k, v in fields.items()))  # noqa: UP031


def _lines(card: Card, found: dict[str, Any]) -> list[str]:
    paper = f"{card.authors}, {card.year}, {card.link}" if card.paper else "a baseline, without a paper"
    official = f"\n{card.official} ({card.licence_of_official or 'licence not stated'})" if card.official else ""
    lines = [f"{card.name}: {card.title}", f"{card.family}; {paper}{official}", "", found["idea"], ""]
    lines += [f"Equation: {card.equation}"] if card.equation else []
    lines += [f"Budget: {card.budget}."] if card.budget else []
    lines += [_claim(card, found["claim"]), ""]
    width = max((len(o["option"]) for o in found["options"]), default=0)
    for o in found["options"]:
        lines.append(f"  {o['option']:<{width}}  {o['type']} = {o['default']}  {o['about']}".rstrip())
    lines += ["", *(f"Departs: {d}" for d in card.departures)]
    lines += [f"Without {what}: {why}." for what, why in card.lacks.items()]
    return [line for line, after in zip(lines, [*lines[1:], ""]) if line or after]


def _claim(card: Card, last: dict[str, Any] | None) -> str:
    if last is None:
        return f"Claim: not attempted; measure it: saccade claim {card.name}"
    reason = f" {last['reason']}" if last.get("reason") else ""
    return f"Claim: {last['verdict']} (tier {last['tier']}, {last['date'][:10]}).{reason}"
