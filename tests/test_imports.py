"""Imports go one way: core <- ops <- methods <- attach <- tasks, measure <- claims <- report, engines, cli."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "saccade"
FILES = sorted(PACKAGE.rglob("*.py"))

# folder -> folders of ours that it may import, itself apart; `models` loads what `attach` is given
MAY = {
    "core": set(),
    "ops": {"core"},
    "methods": {"core", "ops"},
    "attach": {"core", "ops", "methods"},
    "models": {"core"},
}
MAY["tasks"] = MAY["attach"] | {"attach", "models"}
MAY["measure"] = MAY["tasks"] | {"tasks"}
MAY["claims"] = MAY["measure"] | {"measure"}
MAY["report"] = MAY["engines"] = MAY["claims"] | {"claims"}
MAY["cli"] = MAY["report"] | {"report", "engines"}
TORCH_FREE = ["core/card.py", "core/registry.py", "core/errors.py", "core/budget.py", "core/paths.py", "cli/*.py",
              "measure/scale.py", "models/shapes.py"]  # fmt: skip


@functools.cache  # several tests look at every file
def tree(file: Path) -> ast.Module:
    """Its syntax."""
    return ast.parse(file.read_text(encoding="utf-8"))


@functools.cache
def imported(file: Path, at_start: bool = False) -> set[str]:
    """Modules that a file imports, in full; with `at_start` only those that run when it is imported."""
    found, waiting = set(), [tree(file)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif at_start and isinstance(node, (ast.FunctionDef, ast.Lambda)):
            continue
        elif at_start and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
    return found


def short(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def folders(modules: set[str]) -> set[str]:
    """Our own folders among some modules."""
    return {m.split(".")[1] for m in modules if m.startswith("saccade.") and (PACKAGE / m.split(".")[1]).is_dir()}


def test_imports_go_one_way():
    against = {}
    for file in [f for f in FILES if f.parent != PACKAGE]:
        here = file.relative_to(PACKAGE).parts[0]
        against[short(file)] = sorted(folders(imported(file)) - MAY[here] - {here})
    assert not {name: those for name, those in against.items() if those}, "what they must not import"


def test_every_folder_has_its_place():
    code = {f.relative_to(PACKAGE).parts[0] for f in FILES if f.parent != PACKAGE}
    assert code <= set(MAY), "a new folder needs a place in the order"


@pytest.mark.parametrize("outside", ["transformers", "plotly", "rich", "jinja2"])
def test_outside_libraries_stay_where_they_belong(outside):
    may = {"transformers": {"attach", "models"}, "plotly": {"report"}, "rich": {"report", "cli"}, "jinja2": {"report"}}
    users = {short(f) for f in FILES if any(m.split(".")[0] == outside for m in imported(f))}
    assert users, f"nobody imports {outside}: is it still a dependency?"
    assert {u.split("/")[0] for u in users} <= may[outside]


def test_a_method_imports_ops_and_never_a_back_end():
    for file in (PACKAGE / "methods").rglob("*.py"):
        reached = {m for m in imported(file) if m.startswith("saccade.ops.")}
        assert not reached, f"{short(file)} reaches into {reached}; write: from saccade import ops"


def test_a_method_imports_no_other_method():
    for file in (PACKAGE / "methods").rglob("*.py"):
        reached = [m.split(".") for m in imported(file) if m.startswith("saccade.methods.")]
        # what begins with an underscore is no method: the parts of the small nets
        assert not [m for m in reached if not m[3].startswith("_")], short(file)


def test_what_must_start_fast_imports_no_torch():
    for pattern in TORCH_FREE:
        for file in PACKAGE.glob(pattern):
            starts = {m.split(".")[0] for m in imported(file, at_start=True)}
            heavy = starts & {"torch", "transformers", "numpy", "rich"}
            assert not heavy, f"{short(file)} imports {heavy} as it starts"


def test_the_library_never_prints():
    files = [f for f in FILES if "cli" not in f.parts]
    calls = [(f, n) for f in files for n in ast.walk(tree(f)) if isinstance(n, ast.Call)]
    lines = [(short(f), n.lineno) for f, n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not lines, f"print in {lines}; use logging.getLogger('saccade')"
