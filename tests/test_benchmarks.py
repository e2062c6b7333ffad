"""benchmarks/gpu.py and plots.py: the table, the page and the pictures that are made of stored results."""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed-gpu.md"


MADE = ("scale", "frontier-")  # of docs/make.py


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


@pytest.fixture
def plots(gpu):
    return importlib.import_module("plots")


def speed(tflops, share):
    return {"tflops": tflops, "share": share, "ms": 1.0}


def attend(**row):
    usual = {"case": "blocks 128 0.10", "tokens": 131072, "goal": 0.78, "goal_best": 0.9, "dense": "fa3"}
    usual |= {"dense_tflops": 680.0, "dense_kernels": {"fa3": {"tflops": 680.0}}, "triton": speed(510, 0.75)}
    return {"special": True, "environment": {"device_name": "NVIDIA H200"}, "rows": [usual | row]}


def decode(*rows):
    found = []
    for name, by, goal, took, rb in rows:
        found.append({"row": name, "by": by, "goal": goal, "microseconds": took, "rb": rb})
        found[-1] |= {"note": "" if took else "WRONG", "clean": took and 0.8 * took, "rb_clean": rb and rb / 0.8}
    return {"device": "NVIDIA H200", "copy": 4e12, "torch": "2.11", "rows": found}


def model(method, budget="1", part="decode", figures=None, held=100, goals=None, against=None):
    row = {"part": part, "method": method, "budget": budget, "tokens": 16384, "batch": 8, "layers": 8}
    return row | {"figures": figures or {}, "bytes": {"cache": held} if part == "decode" else {}, "goals": goals or {},
                  "against": against or {}}  # fmt: skip


def lines(gpu, folder, **files):
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return {line.case: line for line in gpu.table(gpu.read([folder / f"{name}.json" for name in files]))}


def test_the_page_is_up_to_date(gpu):
    page = PAGE.read_text("utf-8")
    again = "run: python benchmarks/gpu.py --show benchmarks/results --markdown docs/speed-gpu.md"
    assert gpu.filled(page, gpu.read([gpu.RESULTS])) == page, again


def test_the_pictures_are_up_to_date(gpu, plots):
    drawn = plots.drawn(gpu.read([gpu.RESULTS]))
    there = {file.name: file.read_text("utf-8") for file in plots.IMAGES.glob("*.svg")
             if not file.name.startswith(MADE)}  # fmt: skip
    assert there == drawn, "run: python benchmarks/plots.py (and remove what it no longer draws)"


def test_shares_are_held_against_both_goals(gpu, tmp_path):
    (line,) = lines(gpu, tmp_path, a=attend(fa4=speed(620, 0.912), flex=speed(300, 0.44))).values()
    assert gpu.cells(line) == (
        "blocks 128 0.10, 128k", "0.78", "0.750 (510 TFLOP/s, fa3 680)", "fa4 0.912 (620 TFLOP/s)", "0.90", "fa4 0.912",
        "own no, best yes",
    )  # fmt: skip
    assert line.missed


def test_what_is_wrong_has_met_nothing(gpu, tmp_path):
    (line,) = lines(gpu, tmp_path, a=attend(triton={"wrong": 0.5})).values()
    assert (line.reached, line.verdict) == ("WRONG", "no")
    (line,) = lines(gpu, tmp_path, d=decode(("gather", "triton", "16 us", None, None))).values()
    assert (line.reached, line.verdict) == ("WRONG", "no")


def test_without_flash_attention_3_the_table_says_so(gpu, tmp_path):
    lines(gpu, tmp_path, a=attend(), b=attend(dense="cudnn", dense_kernels={"cudnn": {"tflops": 600.0}}))
    assert gpu.remarks(gpu.read([tmp_path / "a.json"])) == ""
    assert "blocks 128 0.10, 128k. Their shares" in gpu.remarks(gpu.read([tmp_path / "b.json"]))


def test_backward_is_also_told_beside_cudnn(gpu, tmp_path):
    kernels = {"cudnn": {"tflops": 540.0}, "fa4": {"tflops": 610.0}}
    data = attend(case="blocks 128 0.10 backward", dense="fa4", dense_kernels=kernels)
    (line,) = lines(gpu, tmp_path, a=data).values()
    assert gpu.reason(line).endswith("Of cuDNN's dense backward, on which the goals were set: triton 0.944.")


def test_goals_of_decoding(gpu, tmp_path):
    found = lines(gpu, tmp_path, d=decode(
        ("gather", "triton", "16 us", 17.0, 0.2), ("gather", "torch", "", 50.0, 0.1),
        ("gather", "block=64", "", 9.0, 0.3), ("int8", "triton", "rb 0.80", 20.0, 0.85),
        ("dense", "triton", "within 3 % of the best", 103.5, 0.9), ("dense", "torch sdpa", "", 100.0, 0.9),
        ("top", "torch.topk alone", "", 9.0, None),
    ))  # fmt: skip
    assert {case: line.verdict for case, line in found.items()} == {
        "gather": "no", "int8": "yes", "dense": "no", "top": ""
    }  # fmt: skip
    assert (found["top"].reached, found["top"].other) == ("no kernel", "torch.topk alone 9.0 µs")
    assert (found["gather"].reached, found["gather"].other) == ("17.0 µs", "torch 50.0 µs")
    assert found["int8"].reached == "rb 0.850 (20.0 µs)"
    assert gpu.reason(found["gather"]).endswith("only what was read: 13.6 µs.")  # and that meets the goal
    assert gpu.reason(found["dense"]) == "Not established."


def test_goals_on_a_grid(gpu, tmp_path):
    rows = {"triton": {"tflops": 340.0}, "flex, order apart": {"tflops": 170.0}}
    found = lines(gpu, tmp_path, g={"pairs": 1.0, "environment": {"device_name": "NVIDIA H200"}, "rows": rows})
    (line,) = found.values()
    assert line.verdict == "yes" and line.other == "flex, order apart 0.250 (170 TFLOP/s)"


def test_goals_of_a_whole_model(gpu, tmp_path):
    rows = [
        model("full", figures={"eager": [0.02], "graph": [0.01]}),
        model("full:attached", figures={"eager": [0.03], "graph": [0.008]}),
        model("snapkv", "0.12", figures={"eager": [0.04], "graph": [0.004]}, held=12, against={"eager": 0.5, "graph": 2,
              "cache": 0.12}, goals={"step": ">= 1.5: eager 0.50, graph 2.00", "cache": "<= 0.125: cache 0.12"}),
    ]  # fmt: skip
    found = lines(gpu, tmp_path, m={"shape": {}, "environment": {"device_name": "NVIDIA H200"}, "rows": rows})
    case = "decode snapkv@0.12 16k x 8, "
    assert {c.removeprefix(case): line.verdict for c, line in found.items()} == {
        "eager [8 layers]": "no", "graph [8 layers]": "yes", "cache [8 layers]": "yes"
    }  # fmt: skip
    line = found[f"{case}graph [8 layers]"]
    assert (line.reached, line.other) == ("4.0 ms (2.000)", "full:attached 8.0 ms")


def test_of_a_case_that_is_there_twice_the_later_counts(gpu, tmp_path):
    old, new = attend(triton=speed(300, 0.44)), attend(triton=speed(600, 0.88))
    for date, data in (("2026-11-27", new), ("2026-11-26", old), ("2026-11-28-quick", old)):
        (tmp_path / f"gpu_attend-h200-{date}.json").write_text(json.dumps(data))
    (line,) = gpu.table(gpu.read([tmp_path]))
    assert line.reached.startswith("0.880")


def test_files_of_others_are_refused(gpu, tmp_path):
    (tmp_path / "gpu_x.json").write_text("{}")
    with pytest.raises(SystemExit, match="is not of gpu_attend"):
        gpu.read([tmp_path])
    with pytest.raises(SystemExit, match="There is no gpu_"):
        gpu.read([ROOT / "docs"])
    with pytest.raises(SystemExit, match="no place for pictures"):
        gpu.filled("# A page\n", [])


def test_all_run_though_one_fails(gpu, monkeypatch, tmp_path, capfd):
    script = "import json, sys\njson.dump({}, open(sys.argv[-1], 'w'))\nsys.exit({})\n"
    (tmp_path / "gpu_attend.py").write_text(script.format(repr(attend()), 1))  # wrote its rows, then failed
    (tmp_path / "gpu_grid.py").write_text("raise SystemExit(3)")
    (tmp_path / "gpu_decode.py").write_text(script.format(repr(decode(("gather", "triton", "16 us", 15.0, 0.2))), 0))
    results = tmp_path / "results"
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(results), "--only", "attend", "grid", "decode"])
    assert gpu.main() == 1
    assert sorted(f.name.rsplit("-", 3)[0] for f in results.iterdir()) == ["gpu_attend-h200", "gpu_decode-h200"]
    out, err = capfd.readouterr()
    assert "gpu_attend.py --peers --ahead 4000000" in out and "1 of 3 goals are met." in out
    assert "gpu_attend.py ended with 1." in err and "gpu_grid.py ended with 3." in err and "gpu_decode" not in err


def test_pictures_are_drawn_of_every_kind(gpu, plots, tmp_path):
    figures = {"eager": [0.02], "eager of32": [0.08], "graph": [0.01], "graph of32": [0.04]}
    rows = [model("full", figures=figures), model("snapkv", "0.12", figures=figures)]
    rows += [model(m, part="prefill", figures={"seconds": [2.0], "attention": [1.0]}) for m in ("full", "hip")]
    lines(
        gpu, tmp_path, gpu_attend=attend(fa4=speed(620, 0.912)), gpu_model={"shape": {}, "rows": rows},
        gpu_decode=decode(*(("decode dense 1 x 32768", by, "", 50.0, 0.6) for by in ("triton", "torch"))),
    )  # fmt: skip
    files = gpu.read([tmp_path])
    drawn = plots.drawn(files)
    assert list(drawn) == list(gpu.PICTURES) == [n for n in gpu.PICTURES if f"img/{n}" in gpu.pictures_part(files)]
    for text in drawn.values():
        root = ET.fromstring(text)
        words = {"".join(e.itertext()) for e in root.iter("{http://www.w3.org/2000/svg}text")}
        assert words & {"own Triton", "dense, PyTorch", "hip@1", "snapkv@0.12"}


@pytest.mark.parametrize("low, high", [(0.3, 300), (7, 17), (1, 1), (1e-6, 1e6)])
def test_ticks_are_around_all_values(plots, low, high):
    svg = importlib.import_module("svg")
    found = svg.log_ticks(low, high)
    assert found[0] <= low and found[-1] >= high and len(found) >= 2 and found == sorted(set(found))
    assert svg.even_ticks(high)[-1] >= high


def test_the_table_needs_stored_files(gpu):
    with pytest.raises(SystemExit):
        gpu.arguments(["--markdown"])


@pytest.mark.slow
def test_landmarks_of_the_real_model_in_two_steps(gpu, tmp_path, monkeypatch, capsys):
    tuned = importlib.import_module("finetune_landmark")
    monkeypatch.setattr(tuned, "cache_dir", lambda *parts: tmp_path.joinpath(*parts))
    given = ["--tokens", "126", "--rows", "2", "--steps", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["finetune_landmark.py", *given])
    tuned.main()
    told = capsys.readouterr()
    assert "2/2 loss" in told.err and "'nats_of_4_blocks': " in told.out
    made = json.loads((tmp_path / "out" / "smollm2.json").read_text())
    assert made["method"] == "landmark" and made["options"] == {"block_tokens": 64, "rank": 16}


def test_of_what_clients_were_told_the_times_are_taken(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    load = importlib.import_module("serve_load")

    def told(asked, *came, text="x"):
        return load.Told(asked, list(came), tokens=len(came), kept=1, text=text)

    rounds = [[told(0, 1, 2, 5), told(0, 2, 3, 4), told(3, 6, 7, text="y")]]
    row = {"method": "full", "way": "together", **load.summary(rounds, [["x", "z", "y"]])}
    assert row["tokens_per_second"] == 8 / 7 and row["long_first"] == 3 and row["kept"] == 3 and row["same"] == 2
    assert row["first"] == {"median": 1.5, "p95": 2, "count": 2}
    assert row["between"] == {"median": 1, "p95": 3, "count": 4}
    assert row["meanwhile"] == {"median": 2, "p95": 3, "count": 2}  # from 2 to 5, from 3 to 4
    alone = {"method": "full", "way": "alone", **load.summary([[told(0, 1), told(2, 3)]], [["x", "x"]])}
    assert load.line(alone).startswith("| `full` | alone | 0.7 | 1.00 / 1.00 | – | – | 1.0 | 2 | 2 of 2 |")
    asked = dict(model="m", dtype="d", budget="1", clients=2, alike=1, own=2, long=3, new=3, chunk=1)
    found = {"asked": asked, "environment": {"device_name": "x", "threads": 1, "torch": "2"}, "date": "today"}
    page = load.table(found | {"rows": [row] * 4}).splitlines()
    assert len({x.count("|") for x in page[:6]}) == 1 and page[-1].startswith("m, d, budget 1: 2 requests of 3 prompt")
