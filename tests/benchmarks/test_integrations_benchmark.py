"""The benchmark of the integrations runs, and compares before it times."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import integrations

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(integrations, "VOCABULARY", 500)
    monkeypatch.setattr(integrations, "DIM", 64)
    monkeypatch.setattr(integrations, "LENGTH", 8)


def test_every_pair_is_measured_or_said_to_be_left_out(tmp_path):
    integrations.main(["--out", str(tmp_path)])
    report = json.loads((tmp_path / "integrations.json").read_text())
    assert len(report["rows"]) + len(report["left_out"]) == len(integrations.PAIRS)
    assert len(report["rows"]) >= 2
    for row in report["rows"]:
        assert row["difference"] < integrations.TOLERANCE and min(row["seconds"].values()) > 0
        assert row["title"] in (tmp_path / "integrations.md").read_text()


def test_a_pair_that_disagrees_is_not_timed():
    x = torch.ones(3, requires_grad=True)
    pair = integrations.Pair("wrong", lambda: x.sum(), lambda: 1.01 * x.sum(), [x])
    with pytest.raises(RuntimeError, match="wrong: loss or gradients differ"):
        integrations.measure(pair)
