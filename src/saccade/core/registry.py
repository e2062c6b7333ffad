"""Names to classes, from the folder itself: a method is known the moment its file exists.

The key is the file name under `methods/*/` with hyphens for underscores. Names and cards are read from the source text;
a class is imported when it is asked for. Other packages add methods through the entry-point group "saccade.methods",
each entry `name = "package.module:Class"`.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import importlib.util
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from saccade.core.card import Card
from saccade.core.errors import BadOption, BugInSaccade, UnknownName

if TYPE_CHECKING:
    from saccade.core.method import Method

METHODS, OWN = Path(__file__).parent.parent / "methods", "saccade.methods."


@functools.lru_cache(maxsize=1)
def _places() -> dict[str, str]:
    """name -> module, or module:Class for a third party. Our own names win."""
    found = {e.name.replace("_", "-"): e.value for e in entry_points(group="saccade.methods")}
    for file in METHODS.glob("*/*.py"):
        if not file.stem.startswith("_"):
            found[file.stem.replace("_", "-")] = f"{OWN}{file.parent.name}.{file.stem}"
    return dict(sorted(found.items()))


def list_methods(pattern: str = "*", family: str | None = None) -> list[str]:
    """Names that match a shell pattern, sorted: `list_methods("*kv*")`, `list_methods(family="cache")`."""
    names = [n for n in _places() if fnmatch.fnmatch(n, pattern)]
    return [n for n in names if family is None or card(n).family == family]


def _place(name: str) -> str:
    places = _places()
    key = name.replace("_", "-")
    if key not in places:
        raise UnknownName("method", name, places, "See them with: saccade list")
    return places[key]


def split(text: str) -> tuple[str, dict[str, str]]:
    """The name and the options of "NAME" or "NAME:OPTION=VALUE,OPTION=VALUE", as they are written.

    Raises:
        BadOption: something behind the colon that is no OPTION=VALUE.
    """
    name, _, given = text.strip().partition(":")
    changes = {}
    for pair in filter(None, given.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise BadOption(f"method {text!r}", f"{pair!r} is no option=value", "Write NAME:OPTION=VALUE,OPTION=VALUE.")
        changes[key.strip()] = value.strip()
    return name, changes


CARD = re.compile(r"^    card(?:: [^=\n]+)? = (Card\(\n(?:        .*\n)+    \))$", re.M)


@functools.cache
def card(name: str) -> Card:
    """The card of a method, read from its source without importing it.

    Raises:
        UnknownName: nobody has a method of that name; the nearest are said.
    """
    call = _alone(_origin(name)) or _card_call(source(name)[1])
    assert call is not None, "source finds classes with a card alone"
    return Card(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})


@functools.cache
def source(name: str) -> tuple[Path, ast.ClassDef]:
    """The file of a method and its class as written there, for what is said without importing it.

    Raises:
        UnknownName: nobody has a method of that name; the nearest are said.
    """
    file, class_name = _origin(name), _place(name).partition(":")[2]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and (not class_name or node.name == class_name) and _card_call(node):
            return file, node
    raise BugInSaccade(f"the card of {name!r}", f"{file} holds no class with `card = Card(...)`")


def _origin(name: str) -> Path:
    module = _place(name).partition(":")[0]
    if module.startswith(OWN):  # a search would import the package around it
        return METHODS.joinpath(*module.removeprefix(OWN).split(".")).with_suffix(".py")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise BugInSaccade(f"the card of {name!r}", f"module {module} has no source")
    return Path(spec.origin)


def _alone(file: Path) -> ast.Call | None:
    """The call of a file's one card, laid out as ours are: to read all of a file for it makes `saccade list` slow."""
    found = CARD.findall(file.read_text(encoding="utf-8"))
    return ast.parse(found[0].strip(), mode="eval").body if len(found) == 1 else None  # type: ignore[return-value]


def _card_call(node: ast.ClassDef) -> ast.Call | None:
    for line in node.body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        value = getattr(line, "value", None)
        if isinstance(target, ast.Name) and target.id == "card" and isinstance(value, ast.Call):
            return value
    return None


def get(name: str) -> type[Method]:
    """The class of a method: `get("snapkv")(window_tokens=16)`. Hyphens and underscores both do.

    Raises:
        UnknownName: nobody has a method of that name; the nearest are said.
    """
    module, _, class_name = _place(name).partition(":")
    loaded = importlib.import_module(module)
    if class_name:
        return getattr(loaded, class_name)
    key = name.replace("_", "-")
    for value in vars(loaded).values():
        if getattr(getattr(value, "card", None), "name", None) == key and isinstance(value, type):
            return value
    raise BugInSaccade(f"method {name!r}", f"{module} holds no class whose card bears that name")
