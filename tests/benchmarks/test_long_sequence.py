"""The benchmark of one long sequence: its cases, its cap, its rows, tables and picture."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import long_sequence, long_sequence_report
from benchmarks.long_sequence import FILE, GB, SMALL, WAYS, Case, in_process, make_tokens, save


def test_all_ways_have_the_same_loss():
    losses = {}
    for way, (_, begin) in WAYS.items():
        losses[way] = begin(Case(way, 48, GB, SMALL))(make_tokens(SMALL, 48))
    assert losses["eager"] == pytest.approx(
        math.log(SMALL["vocab_size"]), abs=0.05
    )  # random weights
    for way, loss in losses.items():
        assert loss == pytest.approx(losses["eager"], rel=2e-3), way


def test_a_case_is_a_process_of_its_own_and_is_saved(tmp_path, capsys):
    arguments = ["--ways", "long", "--tokens", "32", "--small", "--out", str(tmp_path)]
    long_sequence.main(arguments)
    row = json.loads((tmp_path / FILE).read_text())["rows"][0]
    assert (row["way"], row["tokens"], row["failure"]) == ("long", 32, None)
    assert row["attention_masks"] == 0
    assert 0.05 * GB < row["peak_bytes"] < 4 * GB
    assert "long, 32 tokens:" in capsys.readouterr().out


def test_a_case_that_needs_more_than_the_cap_is_a_row_that_says_so():
    row = in_process(Case("eager", 8192, 2 * GB, SMALL), small=True)  # logits alone: 2.1 GB
    assert row["failure"] == "out of memory"


def test_the_sequence_is_the_same_every_time():
    assert make_tokens(SMALL, 8).tolist() == make_tokens(SMALL, 8).tolist()


def test_the_update_that_is_measured_has_moments_and_no_gradients(monkeypatch):
    made, seen = [], []
    own = long_sequence.make_model
    monkeypatch.setattr(long_sequence, "make_model", lambda case: made.append(own(case)) or made[0])
    monkeypatch.setattr(long_sequence.resource, "setrlimit", lambda *limits: None)
    step = torch.optim.AdamW.step

    def watched(optimizer, *args):
        seen.append(len(optimizer.state))
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    long_sequence.measure(Case("linear", 32, GB, SMALL))
    weights = list(made[0].parameters())
    assert seen == [0, len(weights)]
    assert all(weight.grad is None for weight in weights)


def written(folder, *cases):
    for way, tokens, gigabytes in cases:
        row = dict(way=way, tokens=tokens, cap=16 * GB, failure=None, seconds=1.0)
        if gigabytes is None:
            row["failure"] = "out of memory"
        else:
            row["peak_bytes"] = gigabytes * GB
        save(folder / FILE, row, {})
    return folder


def test_tables_tell_what_was_measured_from_what_is_forecast(tmp_path):
    cases = [("eager", 1024, 7.0), ("eager", 2048, 12.0), ("eager", 4096, None)]
    cases += [("long", 1024, 5.0), ("long", 4096, 5.3), ("long", 1024, 4.9)]
    folder = written(tmp_path, *cases)
    table = long_sequence_report.memory_table(folder)
    assert "| peak memory, GB | 1,024 | 2,048 | 4,096 |" in table
    assert "| eager PyTorch | 7.0 | 12.0 | dies at 16 |" in table
    assert "| em-kernels train --long | 4.9 | - | 5.3 |" in table
    fits = long_sequence_report.fits_table(folder)
    assert "| eager PyTorch | 1,024 (1,200) | 2,048 (2,800) | 2,048 (4,500) |" in fits
    # 4.9 GB and 0.4 GB for each 3072 tokens more
    far = "4,096 (over 32,768)"
    assert f"| em-kernels train --long | 4,096 (24,000) | {far} | {far} |" in fits


def test_the_picture_is_drawn(tmp_path):
    folder = written(tmp_path, ("eager", 1024, 7.0), ("long", 1024, 5.0), ("long", 4096, 5.3))
    long_sequence_report.draw(folder, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
