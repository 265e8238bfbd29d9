"""Runs followed through their checkpoints, and reports that stand alone."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from evaluations import letters, save_bigrams, sure, write_rows

from em_kernels import cli
from em_kernels.analysis.metrics import read_metrics
from em_kernels.analysis.page import Figure, Part, Passage, Piece, Section, coloured, page
from em_kernels.analysis.report import write_report
from em_kernels.analysis.run_curve import follow, models_of_run
from em_kernels.analysis.tables import Table, interval, number, of, percent, table
from em_kernels.evaluator import EvalConfig, Records, run_eval
from em_kernels.trainer import TrainConfig
from em_kernels.trainer.checkpoint import write_config

torch.set_num_threads(1)

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Fails on tags that are not closed in order; collects what would be loaded, and the text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.loaded, self.words, self.tags = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [value for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def read_page(folder) -> Page:
    """Checks, of every report, that it loads nothing and that its plots are plots."""
    found = Page((folder / "report.html").read_text(encoding="utf-8"))
    for source in found.loaded:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert "script" not in found.tags and "link" not in found.tags
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose checkpoints are right with 0.3, 0.95 and 0.6 while its entropy falls."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    first = save_bigrams(folder.parent / "first", sure(0.3))
    write_config(folder, TrainConfig(model=first, output=str(folder), prompts="a", updates=4))
    for update, share in ((2, 0.95), (4, 0.6)):
        save_bigrams(folder / f"checkpoint-{update}", sure(share))
    rows = [{"update": u, "loss": 1 / u, "mean_entropy": 1 / u} for u in range(1, 5)]
    write_rows(folder / "metrics.jsonl", [*rows, "broken"])
    return folder


@pytest.fixture(scope="module")
def followed(run, tmp_path_factory):
    problems = write_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", letters(30))
    command = ["analyze", "run", str(run), "--problems", problems, "--samples", "4", "--quiet"]
    assert cli.main(command) == 0
    return json.loads((run / "run.json").read_text())


def test_a_run_is_followed_through_its_checkpoints(run, followed):
    assert [update for update, _ in models_of_run(run)] == [0, 2, 4]
    points = {p["update"]: p for p in followed["points"]}
    for update, share in ((0, 0.3), (2, 0.95), (4, 0.6)):
        found = points[update]
        assert found["accuracy"]["low"] < share < found["accuracy"]["high"]
        entropy = -(share * math.log(share) + (1 - share) * math.log(1 - share))
        assert found["entropy"] == pytest.approx(entropy / 2, rel=1e-2)
        assert found["greedy"]["mean"] == (share > 0.5)
    assert [line["at"] for line in followed["training"]] == [0, 1, 2, 3]
    assert followed["broken_lines"] == ["line 5: not valid JSON (Expecting value)"]


def test_over_confidence(run, followed):
    assert followed["peak"] == 2 and followed["over_confident"] is True
    after = followed["after_peak"]
    assert after["p_value"] < 0.05 and after["high"] < 0
    accuracy = [p["accuracy"]["mean"] for p in followed["points"]]
    assert after["difference"] == pytest.approx(accuracy[2] - accuracy[1])
    best_last = follow(run, [0, 2])
    assert (best_last["peak"], best_last["after_peak"]) == (2, None)
    assert best_last["over_confident"] is False
    # Without metrics the entropy of the answers counts, and it rises from 0.95 to 0.6.
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").unlink()
    without = follow(run, [0, 2, 4])
    (run / "metrics.jsonl").write_text(metrics)
    assert without["over_confident"] is False and without["broken_lines"] == ["no metrics.jsonl"]


def test_the_entropy_law_over_the_checkpoints(followed):
    law = followed["law"]
    points = [(p["label"], p["entropy"], p["performance"]) for p in law["points"]]
    expected = [
        (f"update {p['update']}", p["entropy"], p["accuracy"]["mean"]) for p in followed["points"]
    ]
    assert points == expected and law["fit"]["points"] == 3


def test_the_report_of_a_run(run, followed):
    page = read_page(run)
    for text in ("Accuracy peaks at update 2", "over-confidence", "line 5: not valid JSON"):
        assert text in page.text
    assert len(page.loaded) == 3
    assert sorted(p.name for p in run.glob("*.png")) == ["metrics.png", "run-2.png", "run.png"]


def test_the_report_of_a_run_that_nothing_was_asked_of(tmp_path):
    write_config(tmp_path, TrainConfig(model="m", prompts="a <b> & c"))
    write_report(tmp_path)
    page = read_page(tmp_path)
    assert "no metrics.jsonl" in page.text and "No updates yet." in page.text
    assert "a <b> & c" in page.text
    write_rows(tmp_path / "metrics.jsonl", [{"update": 1, "loss": 2.5, "reward": 0.25}, {"x": 1}])
    assert read_metrics(tmp_path)[1] == ["line 2: 'update' is no number from 1 on but None"]
    write_report(tmp_path)
    assert "reward" in read_page(tmp_path).text


def test_a_metric_that_is_not_finite_is_left_out(tmp_path):
    write_config(tmp_path, TrainConfig(model="m", prompts="a"))
    write_rows(tmp_path / "metrics.jsonl", [{"update": 1, "loss": math.inf, "reward": 0.25}])
    write_report(tmp_path)
    page = read_page(tmp_path)
    assert len(page.loaded) == 1 and "reward" in page.text


def test_plots_leave_the_backend_of_the_caller_alone(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")
    write_config(tmp_path, TrainConfig(model="m", prompts="a"))
    write_rows(tmp_path / "metrics.jsonl", [{"update": 1, "loss": 2.5}])
    write_report(tmp_path)
    assert len(read_page(tmp_path).loaded) == 1 and matplotlib.get_backend() == "svg"


def test_the_report_of_an_evaluation_escapes_and_counts(tmp_path):
    model = save_bigrams(tmp_path / "model", {"a": {"1": 0.5, "d": 0.5}})
    hostile = "<script>alert('&')</script>"
    rows = [
        {"problem": "1 a", "answer": hostile},
        {"problem": "a", "answer": 1},
        "broken",
        {"problem": "a" * 99, "answer": 1},
    ]
    folder = tmp_path / "eval"
    path = write_rows(tmp_path / "problems.jsonl", rows)
    run_eval(EvalConfig(model, path, folder, samples=8), progress=False)
    write_report(folder)
    page = read_page(folder)
    assert hostile in page.text and "row 3: not valid JSON" in page.text
    for text in ("right", "wrong", "without a final answer"):
        assert f"Answers: {text}" in page.text
    records = Records(folder / "records.jsonl").path
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:-5]))
    write_report(folder)
    assert "Not finished: 5 answers are missing." in read_page(folder).text
    records.write_text("")
    write_report(folder)
    assert "No answers yet." in read_page(folder).text


def test_compare_and_select_have_reports(tmp_path, capsys):
    path = write_rows(tmp_path / "problems.jsonl", letters(4))
    for name, share in (("a", 0.5), ("b", 0.9)):
        model = save_bigrams(tmp_path / f"model-{name}", sure(share))
        run_eval(EvalConfig(model, path, tmp_path / name), progress=False)
    folders = [str(tmp_path / name) for name in "ab"]
    assert cli.main(["compare", *folders, "--output", str(tmp_path / "c")]) == 0
    page = read_page(tmp_path / "c")
    assert "B against A, pair by pair" in page.text and len(page.loaded) == 1
    out = str(tmp_path / "s.jsonl")
    command = ["select", "--model", model, "--problems", path, "--output", out, "--by", "margin"]
    assert cli.main([*command, "--samples", "4", "--top", "3", "--quiet"]) == 0
    page = read_page(tmp_path / "s-eval")
    assert "First by margin" in page.text and "Selected prompts" in page.text
    assert cli.main(["report", str(tmp_path / "s-eval")]) == 0
    assert f"report: {tmp_path / 's-eval' / 'report.html'}" in capsys.readouterr().out


def test_reports_do_without_matplotlib(run, followed, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("train_config.json", "run.json", "metrics.jsonl"):
        (tmp_path / name).write_text((run / name).read_text())
    write_report(tmp_path)
    page = read_page(tmp_path)
    assert page.loaded == [] and "matplotlib is not installed" in page.text
    assert "Accuracy peaks at update 2" in page.text


def test_nothing_to_report(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "holds no run, no evaluation and no analysis" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "law.json").write_text("{")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "law.json is not as em-kernels wr" in capsys.readouterr().err


def test_tables():
    table = Table("title <1>", ["", "a"], [["row", "1"], ["longer", "22"]])
    assert table.text() == "title <1>\n           a\n  row      1\n  longer  22"
    html = page("t", [Section("s", tables=[table], folded=("<f>", table))])
    assert html.count("title &lt;1&gt;") == 1 and html.count("<td>") == 8
    assert "<summary>&lt;f&gt;</summary>" in html


def test_rows_become_the_cells_of_columns():
    columns = {"": of("name"), "share": of("x", percent), "x": of("x", number, digits=1)}
    rows = [{"name": "a", "x": 0.25}, {"name": "b", "x": None}]
    made = table("t", columns, rows)
    assert made == Table("t", ["", "share", "x"], [["a", "25.0%", "0.2"], ["b", "–", "–"]])
    assert interval({"mean": 0.5, "low": -0.25, "high": 1}) == "0.500 [-0.250, 1.000]"
    assert interval({"d": 0.5, "low": 0, "high": 1}, "d", sign="+") == "+0.500 [+0.000, +1.000]"
    assert interval(None) == "–"


def shown(pieces, **more) -> str:
    """The page of one passage."""
    passage = Passage("<key>", pieces, **more)
    html = page("<t>", [Section("<s>", ["<n>"], parts=[Part("<p>", [passage])])])
    assert Page(html).tags.count("div") == 1
    return html


def test_coloured_text_is_escaped_and_ordered_by_value():
    html = shown(coloured(["<b>", "&", "x", "y"], [0.0, 1.0, 4.0, math.nan], 2.0))
    assert "&lt;b&gt;" in html and "&amp;" in html and "<b>" not in html
    alphas = [float(a) for a in re.findall(r"rgba\(213,94,0,([\d.]+)\)", html)]
    assert alphas == [0.38, 0.75], "half, and what is beyond the top; none for 0 and NaN"
    assert 'title="1.0000 nats"' in html
    assert "rgba" not in shown(coloured(["a"], [0.0], 0.0))


def test_a_text_is_shown_with_its_own_spaces_and_no_others():
    texts = ["\n a", " ", "b\n\n", "\tc  ", "{{ d }} {% e %}"]
    html = shown(coloured(texts, [0.0] * 5, 1.0), more="and 3 tokens <more>")
    (inside,) = re.findall(r'<div class="text">(.*?)</div>', html, re.DOTALL)
    text, more = "".join(texts), " … and 3 tokens <more>"
    assert Page(f"<p>{inside}</p>").text == text + more
    plain = shown([Piece("".join(texts))])
    assert re.findall(r'<div class="text">(.*?)</div>', plain, re.DOTALL) == [text]


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "\"'&<>", "</title></style>"])
def test_whatever_a_section_holds_is_text(hostile):
    table = Table(hostile, [hostile], [[hostile]])
    figure = Figure(b"", hostile)
    part = Part(hostile, [Passage(hostile, [Piece(hostile, 0.5, hostile)], hostile)], hostile)
    section = Section(hostile, [hostile], [table], [figure], (hostile, table), [part])
    found = Page(page(hostile, [section]))
    assert "script" not in found.tags
    assert found.tags.count("style") == found.tags.count("title") == 1
    # title twice, heading, note, table and its cells twice less a title, fold, part and passage
    assert found.text.count(hostile) == 2 + 1 + 1 + 3 + 1 + 2 + 2 + 3
