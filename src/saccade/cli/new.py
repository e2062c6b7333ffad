"""a method that already runs, with its test and its claim, to be made into yours

In a source checkout the three files go where they belong; --into DIR makes a package of its own, which registers the
method through an entry point once it is installed. What is left to say is marked TODO; `saccade check` counts it.
"""

from __future__ import annotations

import argparse
import keyword
import re
from pathlib import Path
from string import Template

from saccade.cli.console import note
from saccade.cli.tree import Files, checkout, in_checkout, in_package
from saccade.core import registry
from saccade.core.errors import BadOption, CannotRun

EXAMPLE = "saccade new my-method --family cache"
TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = ("sparse", "cache", "decode")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `new` takes."""
    parser.add_argument("name", metavar="NAME", help="registry name: lower case, hyphens between words")
    parser.add_argument("--family", choices=FAMILIES, required=True, help="sparse: pairs of the prefill; cache: what is"
                        " remembered; decode: what a new token reads")  # fmt: skip
    parser.add_argument("--into", type=Path, metavar="DIR", help="make a package of its own in this folder")


def run(args: argparse.Namespace) -> int:
    """Prints the paths of what it wrote."""
    name, stem = args.name, args.name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or keyword.iskeyword(stem):
        raise BadOption(f"new {name!r}", "that is no registry name", "Write lower case, with hyphens: my-method.")
    if name in registry.list_methods():
        raise BadOption(f"new {name!r}", "a method of that name exists", f"Choose another. See: saccade show {name}")
    root = checkout()
    if args.into is None and root is None:
        raise CannotRun(f"new {name!r}", "this is an installed copy, not a source checkout", "Say where: --into DIR.")
    at = in_package(args.into, stem) if args.into or root is None else in_checkout(root, args.family, stem)
    written = _write(_texts(at, name, args.family, root if args.into is None else None))
    print("\n".join(str(file) for file in written))
    install = f"pip install -e {args.into}, then: " if args.into else ""
    note(f"Next: {install}saccade check {name}, which says what is missing.")
    return 0


def _texts(at: Files, name: str, family: str, root: Path | None) -> dict[Path, str]:
    stem = name.replace("-", "_")
    module = f"saccade.methods.{family}.{stem}" if root else f"saccade_{stem}.{stem}"
    words = {"name": name, "stem": stem, "family": family, "module": module}
    words |= {"part": {"sparse": "prefill", "cache": "evict", "decode": "decode"}[family]}
    words["cls"] = "".join(part.capitalize() for part in name.split("-"))
    filled = {at.method: f"{family}_method", at.test: f"{family}_test", at.claim: "claim"}
    if root is None:
        filled |= {at.method.parent / "__init__.py": "package", at.method.parents[1] / "pyproject.toml": "pyproject"}
    return {f: Template((TEMPLATES / f"{t}.txt").read_text("utf-8")).substitute(words) for f, t in filled.items()}


def _write(texts: dict[Path, str]) -> list[Path]:
    there = [str(file) for file in texts if file.exists()]
    if there:
        raise CannotRun("write a new method", [f"{file} is there already" for file in there], "Choose another place.")
    for file, text in texts.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        except OSError as e:
            raise CannotRun(f"write {file}", str(e.strerror), "Choose another place: --into DIR.") from e
    return list(texts)
