"""The part of JSON Schema that our schemas use; an unknown word in a schema is an error, so nothing goes unchecked."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
WORDS = {"$schema", "title", "description", "type", "properties", "required", "additionalProperties", "items", "enum"}
WORDS |= {"const", "anyOf"}


def schema(name: str) -> dict[str, Any]:
    """A published schema: "run", "env", "cell" or "summary"."""
    return json.loads((files("saccade.measure") / "schema" / f"{name}.json").read_text())


def problems(value: Any, rule: Any, where: str = "$") -> list[str]:
    """Every place where a value breaks the rule."""
    if isinstance(rule, bool):
        return [] if rule else [f"{where}: not allowed"]
    assert set(rule) <= WORDS, f"the schema says {set(rule) - WORDS}, which is not checked here"
    if "anyOf" in rule:
        tries = [problems(value, r, where) for r in rule["anyOf"]]
        return [] if [] in tries else min(tries, key=len)
    found = [] if "const" not in rule or value == rule["const"] else [f"{where}: {value!r} is not {rule['const']!r}"]
    if "enum" in rule and value not in rule["enum"]:
        found.append(f"{where}: {value!r} is none of {rule['enum']}")
    if "type" in rule and not any(
        _is(value, t) for t in ([rule["type"]] if isinstance(rule["type"], str) else rule["type"])
    ):
        return [*found, f"{where}: {value!r} is no {rule['type']}"]
    if isinstance(value, dict):
        found += _object(value, rule, where)
    if isinstance(value, list) and "items" in rule:
        found += [p for i, v in enumerate(value) for p in problems(v, rule["items"], f"{where}[{i}]")]
    return found


def _is(value: Any, name: str) -> bool:
    if name in ("number", "integer"):
        return isinstance(value, int if name == "integer" else (int, float)) and not isinstance(value, bool)
    return isinstance(value, TYPES[name])


def _object(value: dict[str, Any], rule: dict[str, Any], where: str) -> list[str]:
    known = rule.get("properties", {})
    found = [f"{where}: lacks {name}" for name in rule.get("required", []) if name not in value]
    for name, entry in value.items():
        found += problems(entry, known.get(name, rule.get("additionalProperties", True)), f"{where}.{name}")
    return found
