"""The RL study in its shortest form, and the numbers its tables are made of."""

import json
import math

import pytest

from benchmarks import rl_study


def test_the_study_writes_tables_and_picture_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    arguments = ["--seeds", "1", "--updates", "2", "--responses", "16", "--problems", "8"]
    arguments += ["--out", str(tmp_path), "--cache", str(tmp_path / "cache")]
    rl_study.main(arguments)
    text = (tmp_path / "rl_study.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert all(f"| {arm} |" in text for arm in rl_study.ARMS)
    study = json.loads((tmp_path / "rl_study.json").read_text())
    for arm, runs in study["arms"].items():
        updates = [line["update"] for line in runs[0]["lines"]]
        assert updates == list(range(1, len(updates) + 1)), arm
        assert runs[0]["points"][-1]["update"] == len(updates) and "greedy" in runs[0]["points"][-1]
    stages = [line["stage"] for line in study["arms"]["ConciseR"][0]["lines"]]
    assert stages == [0, 0, 1, 1]
    assert (tmp_path / "rl_study.png").stat().st_size > 30_000
    monkeypatch.setattr(rl_study, "run_arm", lambda *_: pytest.fail("made again"))
    rl_study.main(arguments)
    assert json.loads((tmp_path / "rl_study.json").read_text()) == study


def test_what_was_kept_is_made_again_under_other_settings(tmp_path):
    made = []
    for key in (1, 1, 2):
        rl_study.cached(tmp_path / "a.json", {"key": key}, lambda: made.append(1))
    assert len(made) == 2


def test_the_law_is_fitted():
    points = [(h, 0.9 - 0.2 * math.exp(h)) for h in (0.1, 0.5, 1.0)]
    law = rl_study.fit_law(points)
    assert (law["a"], law["b"]) == (pytest.approx(0.2), pytest.approx(0.9))
    assert law["ceiling"] == pytest.approx(0.7) and law["r2"] == pytest.approx(1)
    assert law["residual"] < 1e-9 and law["points"] == 3


def test_prediction_compares_signs_and_correlation():
    lines = [
        {"predicted_entropy_change": p, "entropy_change": m, "cov_mean": -m}
        for p, m in ((1.0, 2.0), (2.0, 4.0), (-1.0, -2.0), (-0.5, -1.0))
    ]
    found = rl_study.prediction([{"lines": lines}])
    assert found["correlation"] == pytest.approx(1) and found["same_sign"] == 1
    assert found["covariance_correlation"] == pytest.approx(1) and found["updates"] == 4
