"""What `make bench` runs: how long it says, what it leaves to --full, how it goes on."""

import json

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import softmax_stats, token_loss
from benchmarks.common import Sizes
from benchmarks.report import is_measured, rows_to_resume, save, summary

SMALL = ["--quick", "--n", "4", "--v", "50", "--d", "8", "--dtype", "float32"]


def test_the_default_says_at_its_start_that_it_needs_less_than_ten_minutes():
    options = bench.parse(["--device", "cpu"])
    said = bench.announcement(options)
    assert said.startswith("about 9 minutes on two quiet cores")
    assert "rows are in benchmark-output when they are measured" in said
    assert bench.operators(options) == [*bench.OPERATORS[:4]]
    assert bench.sizes_of("linear_softmax_stats", options) == Sizes(256, 151936, 896)
    one = bench.parse(["--device", "cpu", "--dtype", "bfloat16"])
    assert bench.announcement(one).startswith("about 4 minutes")


@pytest.mark.parametrize("words, hidden", ([["--full"], 1024], [["linear_entropy_loss"], 1024]))
def test_all_of_it_is_measured_in_full_where_asked(words, hidden):
    options = bench.parse([*words, "--device", "cpu"])
    assert bench.operators(options) == (options.op or list(bench.OPERATORS))
    assert bench.sizes_of("linear_entropy_loss", options).n == hidden
    assert bench.announcement(bench.parse(["--full", "--device", "cpu"])).startswith("about 80 min")
    assert set(bench.MINUTES) == set(bench.OPERATORS)


def test_no_time_is_promised_for_other_sizes_or_devices():
    for words in (["--n", "7"], ["--quick"]):
        assert bench.announcement(bench.parse([*words, "--device", "cpu"])).startswith("softmax_st")


def measured(monkeypatch, words):
    """The tables that a run asks to be measured, at a small size."""
    names = []

    def note(case, repeats, found):
        names.append(case.name)
        return []

    monkeypatch.setattr(bench, "measure", note)
    monkeypatch.setattr(bench, "print_table", lambda case, rows: None)
    monkeypatch.setattr(bench, "sizes_of", lambda *_: Sizes(4, 50, 8))
    options = bench.parse([*words, "--device", "cpu", "--dtype", "float32"])
    for operator in bench.DEFAULT:
        bench.measure_operator(operator, torch.float32, options, [], names.append)
    return names


def test_some_tables_are_left_to_the_full_run(monkeypatch):
    full = measured(monkeypatch, ["--full"])
    assert [x for x in full if x not in bench.NOT_BY_DEFAULT] == measured(monkeypatch, [])
    assert set(bench.NOT_BY_DEFAULT) < set(full)


def test_a_run_that_is_stopped_keeps_its_rows_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(token_loss, "peers", lambda **options: ({}, {}))
    words = ["softmax_stats", "token_loss", *SMALL, "--out", str(tmp_path)]

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(token_loss, "our_steps", stopped)
        with pytest.raises(KeyboardInterrupt):
            bench.main(words)
    kept = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert {row["op"].split(" ")[0] for row in kept} == {"softmax_stats"}
    capsys.readouterr()
    rows = bench.main([*words, "--resume"])
    said = capsys.readouterr().out
    assert f"{len(kept)} rows of " in said and "2 of 2 after " in said
    assert rows[: len(kept)] == kept  # not one was timed again
    assert {row["op"].split(" ")[0] for row in rows} == {"softmax_stats", "token_loss"}
    assert json.loads(next(tmp_path.glob("*.json")).read_text())["rows"] == rows


def test_a_table_that_was_stopped_between_its_rounds_is_measured_again():
    case = next(softmax_stats.cases(Sizes(4, 50, 0), torch.float32, "cpu", compiled=False))
    seen = []
    bench.measure(case, 2, seen.append)
    half = len(seen) // 2
    assert not is_measured(case, seen[:half]) and not is_measured(case, seen[:-1])
    assert is_measured(case, seen)
    other = case._replace(sizes=Sizes(5, 50, 0))
    assert not is_measured(other, seen)


def test_only_rows_of_the_same_device_and_versions_are_gone_on_with(tmp_path):
    facts = dict(date="2026-01-02 10:00", device="a", threads=2, torch="2.13", python="3.11")
    assert rows_to_resume(str(tmp_path), facts) == (facts, [])
    rows = [cells(name="em_kernels", seconds=0.5, faster_than={"eager": 3.0, "TRL": 2.0})]
    save(rows, str(tmp_path), facts)
    later = {**facts, "date": "2026-01-03 10:00"}
    assert rows_to_resume(str(tmp_path), later) == (facts, rows)
    assert rows_to_resume(str(tmp_path), {**later, "threads": 1})[1] == []


def cells(name, seconds, faster_than=None, op="softmax_stats forward"):
    at = dict(op=op, n=1, v=2, d=0, dtype="float32", implementation=name, seconds=seconds)
    rest = dict.fromkeys(("of_copy_bandwidth", "gigaflops", "peak_bytes", "extra_bytes", "error"))
    speed = dict(gigabytes_per_second=1.0, failure=None)
    return {**at, "faster_than": faster_than or {}, "times_floor": 2.0, **speed, **rest}


def test_the_end_says_our_best_beside_the_fastest_peer_and_the_floor():
    rows = [
        cells("em_kernels", 0.5, {"eager": 3.0, "TRL": 2.0}),
        cells("em_kernels triton", 0.25, {"eager": 6.0, "TRL": 4.0}),
        cells("eager", 1.5),
        cells("em_kernels", None, op="token_loss"),
    ]
    assert summary(rows).splitlines()[2:] == [
        "| softmax_stats forward, float32, N=1 V=2 | 250.0 | 4.00 (TRL) | 2.00 |"
    ]
