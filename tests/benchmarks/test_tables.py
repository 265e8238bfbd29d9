"""The tables of the README and docs/ are what benchmarks/results says, or are called stale."""

import json

import pytest

from benchmarks import tables
from benchmarks.tables import REGION, TABLES, made, renewed, stale_tables

EMPTY = "before\n<!-- table: {} -->\nold\n<!-- end of table -->\nafter\n"


@pytest.mark.parametrize("path", tables.pages(), ids=lambda path: path.stem)
def test_no_table_is_stale(path):
    assert stale_tables(path.read_text()) == [], "run `make tables`"


def test_every_table_is_shown_somewhere():
    shown = {found[1] for path in tables.pages() for found in REGION.finditer(path.read_text())}
    assert shown == set(TABLES)


def test_only_what_is_between_the_marks_is_made_anew():
    text = renewed(EMPTY.format("matrix"))
    assert text.startswith("before\n<!-- table: matrix -->\n\n| ") and "old" not in text
    assert text.endswith("|\n\n<!-- end of table -->\nafter\n") and renewed(text) == text


def test_a_changed_result_makes_its_table_stale(tmp_path):
    (tmp_path / "matrix.md").write_text("words\n\n| H | x |\n|---|---|\n| 1 | 2 |\n")
    text = renewed(EMPTY.format("matrix"), tmp_path)
    assert "| 1 | 2 |" in text and stale_tables(text, tmp_path) == []
    (tmp_path / "matrix.md").write_text("words\n\n| H | x |\n|---|---|\n| 1 | 3 |\n")
    assert stale_tables(text, tmp_path) == ["matrix"]


def test_a_changed_error_makes_the_tables_of_accuracy_stale(tmp_path):
    names = ("accuracy", "accuracy-verdicts")
    text = renewed("".join(EMPTY.format(name) for name in names))
    lines = (tables.RESULTS / "accuracy.csv").read_text().splitlines()
    for at, line in enumerate(lines):
        if ",reference," in line:
            lines[at] = line.replace("e-8", "e-1").replace("e-7", "e-1")
    (tmp_path / "accuracy.csv").write_text("\n".join(lines) + "\n")
    assert stale_tables(text) == [] and stale_tables(text, tmp_path) == [*names]


def test_check_writes_nothing_and_fails_where_a_table_is_stale(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(EMPTY.format("accuracy"))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [page])
    assert tables.main(["--check"]) == 1 and page.read_text() == EMPTY.format("accuracy")
    assert "page.md: accuracy" in capsys.readouterr().out
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0


@pytest.mark.parametrize(
    "text, why",
    [
        (EMPTY.format("none"), "there is no table 'none'"),
        ("<!-- table: accuracy -->\nold\n", "has no end"),
    ],
)
def test_a_mark_that_means_nothing_is_an_error(text, why):
    with pytest.raises(ValueError, match=why):
        renewed(text)


def cpu_row(implementation, seconds, **more):
    at = dict(op="softmax_stats forward", n=1, v=2, d=0, dtype="float32")
    faster = {"eager": 0.5 / seconds} if implementation == "em_kernels" else {}
    rest = dict(faster_than=faster, times_floor=2.0, extra_bytes=3_000_000)
    return {**at, "implementation": implementation, "seconds": seconds, **rest, **more}


def test_the_newest_run_on_a_cpu_is_shown(tmp_path):
    for date, seconds in (("2026-02-01 10:00", 0.25), ("2026-01-01 10:00", 9.0)):
        rows = [cpu_row("em_kernels", seconds), cpu_row("eager", 0.5)]
        facts = dict(date=date, device="A", threads=2, torch="2.11", rows=rows)
        (tmp_path / f"a-{date[:10]}.json").write_text(json.dumps(facts))
    assert made("cpu", tmp_path).endswith("`benchmarks/results/a-2026-02-01.md`.")
    assert made("cpu-logits", tmp_path).splitlines()[2:] == [
        "| softmax_stats forward | float32 | 250.0 | 2.00 | - | - | 2.00 |"
    ]
    with pytest.raises(ValueError, match="the newest result has no token_loss, float32"):
        tables.row_of(tmp_path, "token_loss", "float32")
