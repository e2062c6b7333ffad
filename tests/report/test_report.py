"""The report: what is in the page, where its numbers come from, and what it says when something is missing."""

from __future__ import annotations

import base64
import html.parser
import itertools
import json
import re
import struct
import zlib
from pathlib import Path

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

import saccade
from saccade.claims import _found
from saccade.core.errors import BadInput, BadOption, CorruptResult
from saccade.report import figures, tables, words
from saccade.report.run import SUMMARY_PARTS, Run
from tests.measure.validate import problems, schema
from tests.report.synthetic import BUDGETS, add_maps, make

HOSTILE = "</script><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>|`*&"
SECTIONS = ("claims", "quality", "speed", "transfer", "tasks", "kept", "maps", "breaks", "repeat")
MOST_BYTES = 6 * 10**6


class Page(html.parser.HTMLParser):
    """The tags of a page, its visible text by section, and its scripts apart."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self.inside, self.section = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "section":
            self.section = dict(attrs)["id"]

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif self.inside != "style" and data.strip():
            self.words.setdefault(self.section, []).append(data)

    def text(self, section: str) -> str:
        return " ".join(" ".join(self.words[section]).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(folder):
    return Page(saccade.report(folder).read_text(encoding="utf-8"))


def page_of(folder) -> Page:
    return Page(saccade.report(folder).read_text(encoding="utf-8"))


def numbers(value) -> set[float]:
    """Every number anywhere in a JSON value."""
    if isinstance(value, dict):
        return set().union(*map(numbers, value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers, value))
    return {value} if isinstance(value, (int, float)) and not isinstance(value, bool) else set()


def test_the_made_up_run_is_what_measure_publishes(folder):
    assert problems(json.loads((folder / "summary.json").read_text()), schema("summary")) == []


# --- the file ---------------------------------------------------------------------------------------------------------


def test_one_file_that_loads_nothing(page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base"), f"<{tag}> may load something"
        assert not {"src", "srcset", "href", "data", "poster", "action"} & set(attrs), (
            f"<{tag} {attrs}> loads something"
        )


def test_style_loads_nothing(folder):
    style = re.search(r"<style>(.*?)</style>", saccade.report(folder).read_text(), re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_small_enough_to_mail(folder):
    assert saccade.report(folder).stat().st_size <= MOST_BYTES


def test_plotly_is_there_once(page):
    assert sum("Plotly" in s and len(s) > 10**6 for s in page.scripts) == 1


def test_headings_go_down_one_step_at_a_time(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_text_is_never_below_12_px():
    style = (Path(figures.__file__).parent / "templates" / "style.css").read_text()
    assert all(float(px) >= 12 for px in re.findall(r"(?:font-size:|font:)\s*(\d+)px", style))
    assert figures.FONT_PX >= 12


@pytest.mark.parametrize("section", SECTIONS)
def test_every_section_is_there_and_says_something(page, section):
    assert ("section", {"id": section}) in page.tags
    assert len(page.text(section)) > 60


def test_every_figure_carries_its_numbers(page):
    plots = [attrs["id"] for tag, attrs in page.tags if tag == "div" and attrs.get("id", "").startswith("plots-")]
    assert set(plots) == {"plots-frontier", "plots-speed", "plots-kept"}
    assert page.text("quality").count("The numbers of") == 1


def test_labels_say_what_moves_a_score(page):
    assert all(
        trait in page.text("tasks") for trait in ("query-aware", "query-agnostic", "one pass", "lower is better")
    )


# --- no number of its own ---------------------------------------------------------------------------------------------


def test_every_number_of_a_table_is_in_the_summary(folder):
    run = Run.read(folder)
    known = {words.say(x, kind) for x in numbers(run.summary) for kind in words.KINDS} | {words.MISSING}
    shown = [tables.transfer(run), tables.points(run), tables.speed(run), tables.crossover(run), tables.noise(run)]
    for table in shown + [tables.results(run, task) for task in run.tasks]:
        for cell in (c for row in table.rows for c in row if isinstance(c.value, (int, float))):
            parts = [p for p in re.split(r"[\[\],]\s|[\[\]]|\s(?=\[)", cell.text) if p]
            assert set(parts) <= known, f"{table.caption}: {cell}"


def test_every_number_of_a_plot_is_in_the_summary(folder):
    run = Run.read(folder)
    looks, known = figures.styles(run), numbers(run.summary)
    for plots in (figures.frontier(run, looks), figures.speeds(run, looks)):
        for drawn in (v for figure in plots.figures for v in figure.variants.values()):
            assert numbers([[trace["x"], trace["y"]] for trace in drawn["data"]]) <= known
        assert all(any(drawn["data"] for drawn in figure.variants.values()) for figure in plots.figures)


def test_the_picture_holds_the_shares_of_the_cell(folder):
    run = Run.read(folder)
    cell = next(c for c in run.cells if c.get("kept"))
    trace = figures.heat_map(run).figures[0].variants[f"{cell['label']} at {cell['budget']}: keys stored"]["data"][0]
    drawn = go.Figure(data=[trace]).to_dict()["data"][0]["z"]
    percents = [share * 100 for layer in cell["kept"]["share"] for head in layer for share in head]
    assert list(base64.b64decode(drawn["bdata"])) == [round(p) for p in percents]


def test_plotly_takes_every_figure(folder):
    run = Run.read(folder)
    looks = figures.styles(run)
    for plots in (figures.frontier(run, looks), figures.speeds(run, looks), figures.heat_map(run)):
        assert plots.figures
        for drawn in (v for figure in plots.figures for v in figure.variants.values()):
            inked = re.sub(r"\$(bg|fg|muted|grid|band)", "#123456", json.dumps(drawn))
            assert "$" not in inked
            go.Figure(json.loads(inked))


def test_every_choice_has_its_figure(folder):
    run = Run.read(folder)
    looks = figures.styles(run)
    for plots in (figures.frontier(run, looks), figures.speeds(run, looks), figures.heat_map(run)):
        keys = {""}
        for chooser in plots.choosers:
            keys = {f"{k}|{value}".lstrip("|") for k in keys for value, _ in chooser.options}
        assert all(set(figure.variants) == keys for figure in plots.figures)


# --- marks and looks --------------------------------------------------------------------------------------------------


def test_grey_where_nothing_was_seen_and_red_below_random(folder):
    run = Run.read(folder)
    seen = {(r["label"], r["budget"], r["task"]): r for r in run.rows}
    for row in (r for r in run.rows if r["method"] != "full"):
        by_chance = [r for r in seen.values() if r["method"] == "random" and r["part"] in row["part"].split("+")]
        lower = run.summary["tasks"][row["task"]]["metric"] == "nll"
        rivals = [r["mean"] for r in by_chance if (r["budget"], r["task"]) == (row["budget"], row["task"])]
        beaten = any((row["mean"] - rival) * (1 if lower else -1) > 0 for rival in rivals)
        expected = tables.NOISE if not row["seen"] else tables.BELOW if beaten else ""
        assert tables.mark(run, row) == expected


def test_the_transfer_table_has_a_place_for_everybody_everywhere(folder):
    run = Run.read(folder)
    table = tables.transfer(run)
    assert [row[0].text for row in table.rows] == run.labels
    assert table.heads[2:] == ("1", *BUDGETS) * 3 and table.groups == tuple((task, 4) for task in run.compared)
    places = [(task, budget) for task in run.compared for budget in ("1", *BUDGETS)]
    signs = {standing: sign for standing, (sign, _) in tables.SIGNS.items()}
    for row in table.rows:
        for cell, (task, budget) in zip(row[2:], places, strict=True):
            known = run.beside.get((row[0].text, budget, task))
            assert cell.sign == (signs.get(known["standing"], "") if known else "")
            assert (cell.text == words.MISSING or cell.text == "no part in it") == (known is None)
    few = tables.transfer(run, ["0.25"])
    assert few.heads[2:] == ("0.25",) * 3 and "full" not in [row[0].text for row in few.rows]


@pytest.mark.parametrize("format", ["html", "markdown", "terminal"])
def test_every_format_signs_what_is_below_random_and_what_has_none_beside_it(folder, format):
    made = saccade.report(folder, format=format)
    text = made if format == "terminal" else made.read_text(encoding="utf-8")
    cells = Run.read(folder).summary["transfer"]
    for standing, (sign, about) in tables.SIGNS.items():
        least = sum(c["standing"] == standing for c in cells)
        assert about in text and text.count(sign) > least, standing
    assert any(c["standing"] in ("below", "lower") for c in cells) and any(c["standing"] == "no random" for c in cells)


def test_a_place_without_a_figure_says_why_in_a_word(tmp_path):
    make(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    here = ("hip", "0.1", "passkey")
    for part in ("rows", "transfer"):
        summary[part] = [c for c in summary[part] if (c["label"], c["budget"], c["task"]) != here]
    failure = {"tokens": 9, "type": "BadInput", "text": "NaN"}
    summary["failed"] = [dict(zip(("label", "budget", "task"), here)) | failure]
    summary["left_out"] = [
        {"label": "tidaldecode", "budgets": ["0.5", "0.1"], "reasons": ["no"]},
        {"label": "kivi", "budgets": list(BUDGETS), "reasons": ["it takes no budget"]},
    ]
    summary["not_exercised"] = [{"label": "snapkv", "part": "cache", "task": "loss"}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    table = tables.transfer(Run.read(tmp_path))
    found = {(row[0].text, *at): cell.text for row in table.rows for cell, at in zip(row[2:], _places(table))}
    assert found["hip", "passkey", "0.1"] == "failed" and found["snapkv", "loss", "0.5"] == "no part in it"
    assert [found["tidaldecode", "passkey", b] for b in BUDGETS] == ["left out", words.MISSING, "left out"]
    assert found["kivi", "passkey", "0.5"] == "at 1" and "○" not in found["kivi", "passkey", "1"]
    assert "left out" in page_of(tmp_path).text("transfer")


def _places(table) -> list[tuple[str, str]]:
    over = [title for title, count in table.groups for _ in range(count)]
    return list(zip(over, table.heads[2:]))


def test_looks_differ():
    labels = [f"m{i}" for i in range(40)]
    rows = [{"label": label, "method": label, "task": "t"} for label in [*labels, "full", "random"]]
    looks = figures.styles(Run({}, {}, [], {"rows": rows, "speed": []}))
    assert len({(s.colour, s.symbol) for s in looks.values()}) == 42


@given(st.floats(1e-6, 1e12))
def test_bytes_and_seconds_keep_three_digits(x):
    for kind, units in (("bytes", {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}), ("seconds", SECONDS)):
        number, unit = words.say(x, kind).split(" ")
        assert float(number.replace(",", "")) * units[unit] == pytest.approx(x, rel=0.005, abs=5e-7 * units[unit])


SECONDS = {"s": 1, "ms": 1e-3, "µs": 1e-6}


def test_the_last_verdict_of_a_claim_is_shown(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_found, "SHIPPED", tmp_path)
    monkeypatch.setenv("SACCADE_CACHE", str(tmp_path / "none"))
    line = {"method": "snapkv", "verdict": "not reproduced", "tier": "smoke", "date": "2026-01-02T03:04:05"}
    line |= {"reason": "", "hardware": "a"}
    later = line | {"verdict": "in part", "tier": "cpu", "date": "2026-01-03T00:00:00", "reason": "too short a prompt"}
    (tmp_path / "snapkv.jsonl").write_text(json.dumps(later) + "\n" + json.dumps(line) + "\n")
    page = page_of(folder)
    assert "snapkv in part cpu, 2026-01-03, a too short a prompt" in page.text("claims")
    assert "not reproduced" not in page.text("claims") and "Not attempted: knorm" in page.text("claims")


# --- hostile, empty, broken -------------------------------------------------------------------------------------------


def test_hostile_text_stays_text(tmp_path, folder):
    hostile, tame = page_of(make(tmp_path, text=HOSTILE)), page_of(folder)
    assert len(hostile.scripts) == len(tame.scripts)
    assert {tag for tag, _ in hostile.tags} == {tag for tag, _ in tame.tags}
    assert not any(name.startswith("on") for _, attrs in hostile.tags for name in attrs)
    assert "alert(1)" in hostile.text("breaks"), "the text itself must be shown"


def test_hostile_text_stays_in_its_cell_of_markdown(tmp_path):
    text = saccade.report(make(tmp_path, text=HOSTILE), format="markdown").read_text()
    assert "<script" not in text and "<img" not in text
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    heads = [
        len(re.findall(r"(?<!\\)\|", block.splitlines()[0])) for block in text.split("\n\n") if block.startswith("|")
    ]
    assert set(widths) == set(heads)


def test_empty_sections_say_so(tmp_path):
    bare = page_of(make(tmp_path, speed=False, breaks=False, kept=False))
    assert "Speed was not measured in this run." in bare.text("speed")
    assert "No sample was right under full and wrong under a method." in bare.text("breaks")
    assert "No picture of what was kept was taken in this run." in bare.text("kept")


def test_a_run_in_which_everything_failed(tmp_path):
    make(tmp_path, speed=False)
    summary = json.loads((tmp_path / "summary.json").read_text()) | {"rows": [], "noise": {}}
    summary["failed"] = [
        {"label": "full", "budget": "1", "task": "loss", "tokens": 9, "type": "BadInput", "text": "NaN"}
    ]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = page_of(tmp_path)
    assert "Quality was not measured in this run." in page.text("quality")
    assert "BadInput: NaN" in page.text("tasks")
    assert saccade.report(tmp_path, format="terminal") and saccade.report(tmp_path, format="markdown")


def test_cells_of_other_runs_in_the_folder_are_left_out(tmp_path):
    make(tmp_path)
    before = Run.read(tmp_path).cells
    (tmp_path / "cells" / "0123.json").write_text(json.dumps({"key": "0123"}))
    assert Run.read(tmp_path).cells == before


def test_what_did_not_run_is_said(tmp_path):
    make(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["failed"] = [
        {"label": "hip", "budget": "0.1", "task": "loss", "tokens": 9, "type": "BadInput", "text": "NaN"}
    ]
    summary["left_out"] = [{"label": "duo-attention", "budgets": ["0.5"], "reasons": ["no artefact for this model"]}]
    summary["missing"] = 3
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = page_of(tmp_path)
    assert "BadInput: NaN" in page.text("tasks") and "no artefact for this model" in page.text("tasks")
    assert "3 of its cells are missing" in page.text("")


# --- errors -----------------------------------------------------------------------------------------------------------


def test_no_such_folder(tmp_path):
    with pytest.raises(BadInput, match=r"a report on .*nowhere: there is no such folder. Make a run: saccade compare"):
        saccade.report(tmp_path / "nowhere")


def test_a_folder_without_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(BadInput, match=r"it holds no run.json, but notes.txt. Make a run: saccade compare --out"):
        saccade.report(tmp_path)


def test_an_unfinished_run(tmp_path):
    (make(tmp_path) / "summary.json").unlink()
    with pytest.raises(BadInput, match=r"it has no summary.json: the run is not finished. Start"):
        saccade.report(tmp_path)


def test_a_missing_file(tmp_path):
    (make(tmp_path) / "env.json").unlink()
    with pytest.raises(CorruptResult, match=r"env.json: it is missing. Start the run again: finished cells are kept"):
        saccade.report(tmp_path)


@pytest.mark.parametrize("part", SUMMARY_PARTS)
def test_a_summary_of_another_make(tmp_path, part):
    make(tmp_path, speed=False, kept=False)
    summary = json.loads((tmp_path / "summary.json").read_text())
    del summary[part]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(CorruptResult, match=rf"summary.json: it lacks {part}\. Start the run again"):
        saccade.report(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "env.json", "summary.json", "cells"])
def test_broken_json(tmp_path, name):
    make(tmp_path)
    file = next((tmp_path / name).iterdir()) if name == "cells" else tmp_path / name
    file.write_text("{broken\n")
    with pytest.raises(CorruptResult, match=rf"{re.escape(file.name)}.*: it is no JSON "):
        saccade.report(tmp_path)


def test_an_unknown_format(folder):
    with pytest.raises(
        BadOption, match=r"report\(format='pdf'\): no such format. Give one of: html, markdown, terminal"
    ):
        saccade.report(folder, format="pdf")


# --- the other formats ------------------------------------------------------------------------------------------------


def test_markdown_holds_a_line_for_every_row(folder):
    run, text = Run.read(folder), saccade.report(folder, format="markdown").read_text()
    lines = set(text.splitlines())
    for task in run.tasks:
        for row in tables.results(run, task).rows:
            start = f"| {row[0].text} | {row[1].text} | {row[2].text} |"
            assert any(line.startswith(start) for line in lines)


def test_terminal_is_text_without_colour_when_piped(folder):
    text = saccade.report(folder, format="terminal")
    assert isinstance(text, str) and "\x1b" not in text
    assert all(label in text for label in Run.read(folder).labels if label != "full")


def test_out_is_where_it_is_written(folder, tmp_path):
    for format in ("html", "markdown", "terminal"):
        wanted = tmp_path / "new" / format
        assert saccade.report(folder, out=wanted, format=format) == wanted and wanted.stat().st_size


def test_public_names_stay_functions():
    import saccade.attach
    import saccade.report

    assert callable(saccade.report) and callable(saccade.attach)


# --- maps -------------------------------------------------------------------------------------------------------------


def pixels(address: str) -> tuple[int, int, bytes, bytes]:
    """Of an image of ours: width, height, codes and palette."""
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(body),)
        chunks[body[:4]], at = body[4:], at + 12 + size
    wide, high = struct.unpack(">II", chunks[b"IHDR"][:8])
    lines = zlib.decompress(chunks[b"IDAT"])
    rows = [lines[i * (wide + 1) : (i + 1) * (wide + 1)] for i in range(high)]
    assert chunks[b"tRNS"][255] == 0 and set(chunks[b"tRNS"][:255]) == {255} and all(row[0] == 0 for row in rows)
    return wide, high, b"".join(row[1:] for row in rows), chunks[b"PLTE"]


def test_maps_are_images_within_the_page(tmp_path):
    said = add_maps(make(tmp_path))
    page = page_of(tmp_path)
    found = [pixels(attrs["src"]) for tag, attrs in page.tags if tag == "img"]
    stretches = [s for p in said["pictures"] for s in p["stretches"]]
    codes = [base64.b64decode(s[name]) for s in stretches for name in ("chosen", "mass")]
    shapes = [tuple(s["shape"]) for s in stretches for _ in range(2)]
    assert [(high, wide) for wide, high, _, _ in found] == shapes and [x[2] for x in found] == codes
    for palette, (least, most) in zip([x[3] for x in found], itertools.cycle([(0, 100), (50, 250)])):
        blue, yellow = (palette[3 * code : 3 * code + 3] for code in (least, most))
        assert blue == bytes((0, 34, 78)) and yellow == bytes((254, 232, 56)) and len(palette) == 768
    words = page.text("maps")
    assert "layer 3, head 5, the one that looks afar" in words and "No map of kivi at 1: it cannot" in words
    for s in stretches:
        assert words.count(words_of_share(s["covered_here"])) and words.count(words_of_share(s["density"]))


def words_of_share(share: float) -> str:
    return words.say(share, "share")


def test_strangers_words_in_maps_stay_words(tmp_path):
    add_maps(make(tmp_path), text=HOSTILE)
    page = page_of(tmp_path)
    assert all(a["src"].startswith("data:image/png;base64,") for tag, a in page.tags if tag == "img")
    assert HOSTILE in page.text("maps") and not any("alert(" in s for s in page.scripts if len(s) < 200)


def test_a_run_without_maps_says_how_to_make_them(page):
    assert "saccade report RUN_DIR --pictures makes them" in page.text("maps")
