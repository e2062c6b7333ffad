"""One HTML file: everything in it, nothing loaded, light and dark."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

import jinja2
from plotly.offline import get_plotlyjs

from saccade.report import figures, images, tables
from saccade.report.heads import Heads
from saccade.report.run import Run
from saccade.report.verdicts import verdicts
from saccade.report.words import say

if TYPE_CHECKING:
    from saccade.measure.attended import Attended


@functools.cache
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("saccade.report")
    found = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return found


def render(run: Run) -> str:
    """The page as text."""
    looks = figures.styles(run)
    templates = _templates()
    return templates.get_template("report.html.jinja").render(
        run=run,
        looks=looks,
        verdicts=verdicts(run),
        facts=facts(run),
        frontier=figures.frontier(run, looks),
        speeds=figures.speeds(run, looks),
        kept=figures.heat_map(run),
        undrawn=undrawn(run),
        maps=images.cards(run),
        map_table=tables.maps(run) if run.maps else None,
        map_colours=images.scale(),
        absent=tables.absent(run),
        transfer=tables.transfer(run),
        signs=tables.SIGNS.values(),
        results=[(task, tables.traits(run, task), tables.results(run, task)) for task in run.tasks],
        environment=environment(run),
        cards=run.cards(),
        say=say,
        style=_source("style.css"),
        script=_source("page.js"),
        plotly=get_plotlyjs(),
    )


def render_heads(heads: Heads) -> str:
    """The page of an artefact as text."""
    return _templates().get_template("heads.html.jinja").render(
        heads=heads,
        looks={},
        facts=heads.facts(),
        map=figures.heads_map(heads),
        style=_source("style.css"),
        script=_source("page.js"),
        plotly=get_plotlyjs(),
    )


def render_attended(found: Attended, facts: list[tuple[str, str]]) -> str:
    """The page of what a method attends to as text; `facts` say of what text, in which model."""
    return _templates().get_template("attended.html.jinja").render(
        found=found,
        looks={},
        facts=facts,
        shown=tables.STAGES,
        maps=figures.attended_maps(found),
        say=say,
        style=_source("style.css"),
        script=_source("page.js"),
        plotly=get_plotlyjs(),
    )


def _source(name: str) -> str:
    loader = _templates().loader
    assert loader is not None
    return loader.get_source(_templates(), name)[0]


def undrawn(run: Run) -> list[str]:
    """What took part and has no picture of what was kept."""
    drawn = {cell["label"] for cell in run.cells if cell.get("kept")}
    return [label for label in run.labels if label != tables.FULL and label not in drawn]


ASKED = {
    "tokens": "Tokens of a sample",
    "lengths": "Tokens timed",
    "dtype": "Precision",
    "device": "Device",
    "seed": "Seed",
}


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in a few words."""
    budgets = list(dict.fromkeys(r["budget"] for r in run.rows if r["method"] != "full"))
    return [
        ("Model", str(run.summary["model"])),
        ("Methods", ", ".join(run.labels)),
        ("Budgets", ", ".join(budgets)),
        ("Tasks", ", ".join(run.tasks)),
        *[(title, _flat(run.run[name])) for name, title in ASKED.items() if name in run.run],
    ]


def environment(run: Run) -> list[tuple[str, str]]:
    """Every line of env.json."""
    return [(name, _flat(value)) for name, value in run.env.items()]


def _flat(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_flat(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
