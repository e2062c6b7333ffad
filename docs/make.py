"""Make the generated pages: one per method, the tables of README and docs/index.md, and the comparison that is shown.

    python docs/make.py                 write what has changed
    python docs/make.py --check         write nothing; end with 1 where a page is not up to date
    python docs/make.py --run RUN_DIR   show this finished run of `saccade compare` (copied, without its cells)
    python docs/make.py --run RUN_DIR --page transfer    the same for docs/transfer.md, a run over cache and decode
    python docs/make.py --run RUN_DIR --page sparse      the same for docs/sparse.md; docs/frontier.md shows both
    python docs/make.py --run RUN_DIR --page gemma       the same for docs/gemma.md, another model

Cards, docstrings, results of claims, the runs in docs/run and docs/run-*, and what `saccade plan` reckons, are all that
is read: nothing here is written by hand.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "docs")]

import choosing_page  # noqa: E402
import frontier_page  # noqa: E402
import orderings_page  # noqa: E402
import parallel_page  # noqa: E402
import scale_page  # noqa: E402
from stored import newest  # noqa: E402

from saccade.claims._found import lines  # noqa: E402
from saccade.cli.show import bibtex, idea, options  # noqa: E402
from saccade.core import registry  # noqa: E402
from saccade.core.card import PROPERTIES, Card  # noqa: E402
from saccade.report import markdown, tables  # noqa: E402
from saccade.report.run import Run  # noqa: E402

RUN = ROOT / "docs" / "run"
FAMILIES = {"transfer": ("cache and decode", ROOT / "docs" / "run-transfer"),
            "sparse": ("sparse", ROOT / "docs" / "run-sparse")}  # fmt: skip
RUNS = {"comparison": RUN, "gemma": ROOT / "docs" / "run-gemma"}  # page -> the run that it shows
RUNS |= {name: folder for name, (_, folder) in FAMILIES.items()}
RUN_FILES = ("run.json", "env.json", "summary.json")
NOTE = "<!-- made by docs/make.py from the card, the docstring and the results of claims; do not edit -->\n"
FILLED = ("README.md", "docs/index.md")

# properties of the conformance suite, in words
WORDS = {
    "full-budget": "a full budget equals dense attention",
    "mask": "the output equals dense attention under the selection's mask",
    "budget": "what is achieved stays within what is asked, and short contexts work",
    "padding": "padding changes nothing on real tokens",
    "batch": "a row depends on no neighbour and on no earlier sample",
    "chunks": "a prompt in chunks equals the prompt at once, and steps equal one pass",
    "gqa": "grouped heads equal repeated heads",
    "cache-ops": "beam reorder, crop and batch select commute with the cache",
    "detach": "detaching restores the model bit for bit",
    "causality": "nothing depends on a later token",
    "forms": "all forms of a layer agree, gradients too",
    "memory": "poisoned memory and strided inputs change nothing; the dtype is kept",
    "errors": "every documented error is raised, with its text",
    "bytes": "bytes reported are bytes held",
    "seed": "the same seed gives the same selection",
    "keys": "every query of a prompt has a key",
    "assisted": "assisted decoding",
    "compile": "torch.compile",
    "backward": "gradients",
}
ACHIEVED = {
    "sparse": 'run.record.density("prefill")',
    "cache": "run.record.kept_fraction, run.record.bytes_held",
    "decode": 'run.record.density("decode")',
    "probes": "run.result()",
}
TRAIN = {"mixers": "saccade train --task mqar --mixer {}", "nets": "saccade train --task digits --mixer {}"}
LAYERS = ("padding", "chunks", "cache-ops", "causality", "forms", "memory")  # what is tested of a layer that is trained
assert set(PROPERTIES) <= set(WORDS), "a new property needs its words"


def measured(name: str) -> dict[str, Any] | None:
    """The newest result on a real model, of those shipped; the smoke tier tests our machinery, not the paper."""
    return max((x for x in lines(name, shipped=True) if x["tier"] != "smoke"), key=lambda x: x["date"], default=None)


def stem(name: str) -> str:
    """File name of a method."""
    return name.replace("-", "_")


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    cells = [heads, ["---"] * len(heads), *[[text.replace("|", "\\|") for text in row] for row in rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def page(name: str) -> str:
    """All that is known of a method."""
    card = registry.card(name)
    parts = [f"# {name}\n\n{_origin(card)}\n\n> {card.summary}", _idea(card), _options(name), _use(card)]
    parts += [_claim(name, card), _properties(card)]
    if card.departures:
        parts.append("## Where it departs from paper or official code\n\n" + _bullets(card.departures))
    if card.paper:
        parts.append(f"## Cite the paper\n\n```bibtex\n{bibtex(card)}\n```")
    return NOTE + "\n" + "\n\n".join(parts) + "\n"


def _bullets(texts: Iterator[str] | tuple[str, ...]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _origin(card: Card) -> str:
    if not card.paper:
        return f"*{card.title}* · family `{card.family}` · a baseline, without a paper of its own"
    code = f" · official code [{card.official}](https://github.com/{card.official})" if card.official else ""
    licence = f" ({card.licence_of_official})" if card.official and card.licence_of_official else ""
    paper = f"[{card.paper}]({card.link})" if card.link else card.paper
    return f"*{card.title}* · {card.authors}, {card.year} · {paper}{code}{licence} · family `{card.family}`"


def _idea(card: Card) -> str:
    # the docstring is plain text: its equations would be read as Markdown's emphasis
    text = f"## Idea\n\n```text\n{idea(card.name)}\n```"
    return text + (f"\n\nIn one line: `{card.equation}`." if card.equation else "")


def _options(name: str) -> str:
    made = [o for o in options(name) if o["option"] != "artefact"]
    if not made:
        return "## Options\n\nIt has none."
    rows = [[f"`{o['option']}`", f"`{o['type']}`", f"`{o['default']}`", o["about"]] for o in made]
    return "## Options\n\n" + table(["option", "type", "default", "meaning"], rows)


def _use(card: Card) -> str:
    budget = ", budget=0.25" if card.takes_budget and card.family != "probes" else ""
    code = f'with saccade.attach(model, "{card.name}"{budget}) as run:\n    out = model.generate(**inputs)\n'
    text = f"## Use\n\n```python\n{code}print({ACHIEVED.get(card.family, 'run.record.bytes_held')})\n```"
    if card.family in TRAIN:
        line = TRAIN[card.family].format(card.name)
        text = f"## Use\n\n```bash\n{line}\n```\n\n[How layers are trained](../train.md)."
    text += f"\n\nA budget means: {card.budget}." if card.budget else ""
    text += f"\n\nIts score is given the model's {' and '.join(card.needs)}." if card.needs else ""
    if card.calibrated:
        text += f"\n\nIt is calibrated: `saccade calibrate {card.name} --model NAME` makes what it needs for a model."
    return text


def _claim(name: str, card: Card) -> str:
    found = measured(name)
    again = f"Measure it: `saccade claim {name} --tier cpu`."
    compare = f"Compare it: `saccade compare --methods {name}{'' if card.takes_budget else ' --budgets 1'}`."
    if card.family in TRAIN:
        compare = f"Compare it: `{TRAIN[card.family].format(name)}`."
    if card.family == "probes":
        compare = f"See it: `saccade calibrate {name}` prints a path, and `saccade report PATH` draws its heads."
    if found is None:
        return f"## Claim\n\nNot attempted yet. {again}\n\n{compare}"
    rows = [[c["name"], _range(c), *map(_short, (c["bar"], c["n"], c["smallest_effect"])), _word(c)]
            for c in found["checks"]]  # fmt: skip
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    parts = [
        f"**{found['verdict']}** (tier `{found['tier']}`, {found['date'][:10]})",
        f"The paper ({found['where']}): {found['says']}",
        f"Here: {found['setting']}.",
        table(["check", "found, with its interval", "bar", "samples", "smallest visible effect", "holds"], rows),
        *([found["reason"]] if found["reason"] else []),
        f"{found['hardware']}; {versions}; commit {found['commit']}; {found['seconds']:.0f} s. {again}",
        compare,
    ]
    return "## Claim\n\n" + "\n\n".join(parts)


def _word(check: dict[str, Any]) -> str:
    return "yes" if check["holds"] else "unclear" if check.get("unclear") else "no"


def _range(check: dict[str, Any]) -> str:
    value, low, high = (_short(check[k]) for k in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _properties(card: Card) -> str:
    if card.family == "nets":
        return "## What is tested\n\nIts own tests compare it with its equation written out, gradients too."
    mine = LAYERS if card.family == "mixers" else [p for p in PROPERTIES if p != "forms"]
    held = [WORDS[p] for p in mine if p not in card.lacks]
    text = "## What is tested\n\nThe conformance suite tests that " + "; ".join(held) + "."
    if card.family == "probes":
        text += " Under a probe every bit is the model's own, and what it saw of a text depends on that text alone."
    lacks = [f"{WORDS[what]} (`{what}`): {why}" for what, why in card.lacks.items()]
    return text + (f"\n\nIt does not have:\n\n{_bullets(lacks)}" if lacks else "")


def methods(prefix: str) -> str:
    """The table of all methods; `prefix` leads to their pages."""
    rows = []
    for name in registry.list_methods():
        card, found = registry.card(name), measured(name)
        paper = f"[{card.paper.removeprefix('arXiv:')}]({card.link})" if card.link else "–"
        said = f"{found['verdict']} ({found['date'][:10]})" if found else "–" if card.baseline else "not attempted"
        rows.append([f"[{name}]({prefix}methods/{stem(name)}.md)", card.family, paper, card.summary, said])
    return table(["method", "family", "paper", "what it does", "claim, re-measured"], rows)


def comparison(prefix: str) -> str:
    """The run that is shown, at one budget; the whole of it is a page."""
    if not (RUN / "summary.json").is_file():
        return "No run is committed yet: `python docs/make.py --run RUN_DIR` puts one here."
    run = Run.read(RUN)
    budgets = [b for b in dict.fromkeys(row["budget"] for row in run.rows) if b != "1"]
    shown = tables.transfer(run, budgets[len(budgets) // 2 : len(budgets) // 2 + 1])
    others = f"; whole families at several budgets: [the frontier]({prefix}frontier.md)" if _there(*FAMILIES) else ""
    others += f"; another model: [Gemma-3-270M]({prefix}gemma.md)" if _there("gemma") else ""
    parts = [
        f"Paired difference to `full`, with its interval, at one of the budgets; the rest is in [the whole"
        f" report]({prefix}comparison.md){others}.",
        f"Retrieval scores hits (higher is better), losses are in nats (lower is better). {markdown.key()}",
        markdown.table(shown),
        f"Measured on: {_machine(run.env)}.",
    ]
    return "\n\n".join(parts)


def _there(*names: str) -> bool:
    """Whether the run of one of these pages is."""
    return any((RUNS[name] / "summary.json").is_file() for name in names)


def _machine(env: Any) -> str:
    known = [env.get("cpu"), env.get("device_name"), *(f"{k} {env[k]}" for k in ("torch", "transformers") if k in env)]
    return ", ".join(str(x) for x in dict.fromkeys(known) if x)


def many_gpus(prefix: str) -> str:
    """What docs/explanation/scale.md shows of `saccade plan`."""
    parts = [f"![Llama-3-8B on many GPUs, reckoned]({prefix}img/scale.svg)"]
    for name in ("llama-3-8b", "llama-3-70b"):
        parts += [f"### {title}\n\n{table(heads, rows)}" for title, heads, rows in scale_page.tables(name)]
    parts.append(f"### Whole prefills on one GPU, measured and reckoned\n\n{table(*scale_page.agreement())}")
    return "\n\n".join(parts)


def several(prefix: str) -> str:
    """What docs/parallel.md shows of texts shared among GPUs."""
    path, data = newest("parallel")
    parts = [
        f"Measured with {data['ranks']} GPUs ({_machine(data['environment'])})"
        f" ([all numbers]({prefix}benchmarks/results/{path.name})). {parallel_page.equal(data['check'])}",
        table(*parallel_page.table(data["grow"])),
    ]
    return "\n\n".join(parts)


def single_layers(prefix: str) -> str:
    """What docs/speed-gpu.md shows of choosing and of growth."""
    env = newest("sparse")[1]["environment"]
    parts = [table(*choosing_page.choosing()), table(*choosing_page.growth()), f"Measured on: {_machine(env)}."]
    return "\n\n".join(parts)


def ordered(prefix: str) -> str:
    """What docs/train.md shows of methods against the baselines of their papers."""
    there = f"{prefix}benchmarks/results"
    runs = [f"{_machine(env)} ([all numbers]({there}/{name}))" for name, env in orderings_page.measured()]
    parts = [table(*orderings_page.table()), *([f"Measured on: {'; '.join(runs)}."] if runs else [])]
    return "\n\n".join([*parts, f"```bash\n{orderings_page.commands()}\n```"])


def frontier(runs: dict[str, Run]) -> str:
    """What whole families keep of the quality, budget by budget."""
    words = [
        "# The frontier: quality against what is kept",
        "All methods of a family at several budgets, with `full`, `random` in the same part of the work, `streaming`"
        " and `oracle-topk`, the exact best keys. *Hits* are the mean over the tasks that count them (higher is better)"
        ", *loss* is nats per token above `full` (lower is better). *Below random*: in so many of its cells (tasks x"
        " budgets) it does worse, on average, than the same budget spent at random; intervals are in the whole tables.",
    ]
    for name, run in runs.items():
        tokens, counts = run.run["tokens"], run.run["counts"]
        samples = ", ".join(f"{task} {n}" for task, n in counts.items())
        words += [f"## {FAMILIES[name][0]}", f"{run.summary['model']}, texts of {tokens:,} tokens; samples: {samples}."]
        words += [f"![{frontier_page.PARTS[p][0]}](img/frontier-{p}.svg)" for p in frontier_page.parts(run)]
        words += [table(*frontier_page.table(run))]
        words += ["Left out, and why:\n\n" + _bullets(frontier_page.absent(run))] if run.summary["left_out"] else []
        if lost := run.summary["missing"]:
            words.append(f"{lost} of {len(run.run['cells'])} cells are missing.")
        words += [f"Every cell with its interval: [the whole table]({name}.md). Measured on: {_machine(run.env)}."]
        words += [f"```bash\n{command}\n```" for command in run.summary["repeat"]]
    return f"{NOTE}\n" + "\n\n".join(words) + "\n"


# pages written by hand but for one part -> its mark, and what makes it
PARTS = {
    "docs/explanation/scale.md": ("scale", many_gpus),
    "docs/parallel.md": ("parallel", several),
    "docs/speed-gpu.md": ("layers", single_layers),
    "docs/train.md": ("orderings", ordered),
}


def pages() -> dict[Path, str]:
    """path -> what should be there."""
    made = {ROOT / "docs" / "methods" / f"{stem(n)}.md": page(n) for n in registry.list_methods()}
    for name in FILLED:
        prefix = "" if name.startswith("docs/") else "docs/"
        text = (ROOT / name).read_text(encoding="utf-8")
        made[ROOT / name] = _fill(_fill(text, "methods", methods, prefix), "comparison", comparison, prefix)
    for name, (part, make) in PARTS.items():
        made[ROOT / name] = _fill((ROOT / name).read_text(encoding="utf-8"), part, make, "../")
    made[ROOT / "docs" / "img" / "scale.svg"] = scale_page.drawn()
    for name, folder in RUNS.items():
        if _there(name):
            made[ROOT / "docs" / f"{name}.md"] = f"{NOTE}\n{markdown.render(Run.read(folder))}"
    runs = {name: Run.read(RUNS[name]) for name in FAMILIES if _there(name)}
    made[ROOT / "docs" / "frontier.md"] = frontier(runs)
    for run in runs.values():
        for part in frontier_page.parts(run):
            made[ROOT / "docs" / "img" / f"frontier-{part}.svg"] = frontier_page.drawn(run, part)
    return made


def _fill(text: str, part: str, make: Callable[[str], str], prefix: str) -> str:
    """The text with what is between `<!-- part -->` and `<!-- /part -->` made anew, where it has these marks."""
    between = rf"(<!-- {part} -->\n).*?(<!-- /{part} -->)"
    return re.sub(between, lambda m: f"{m[1]}{make(prefix)}\n{m[2]}", text, flags=re.DOTALL)


def stale() -> list[str]:
    """Pages that are missing, not up to date, or of a method that is gone."""
    wanted = pages()
    old = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    gone = [p for p in (ROOT / "docs" / "methods").glob("*.md") if p not in wanted]
    return sorted(str(p.relative_to(ROOT)) for p in old + gone)


def write() -> list[str]:
    """Bring all pages up to date; returns those that were not."""
    old, wanted = stale(), pages()
    for name in old:
        if (ROOT / name) in wanted:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_text(wanted[ROOT / name], encoding="utf-8")
        else:
            (ROOT / name).unlink()
    return old


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where a page is not up to date")
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="show this finished run")
    parser.add_argument("--page", choices=RUNS, default="comparison", help="the page that shows it")
    given = parser.parse_args()
    if given.run:
        Run.read(given.run)  # it is whole, or an error says what is wrong
        RUNS[given.page].mkdir(exist_ok=True)
        for name in RUN_FILES:
            shutil.copy(given.run / name, RUNS[given.page] / name)
    old = stale() if given.check else write()
    print("\n".join(old) or "all pages are up to date")
    return 1 if given.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
