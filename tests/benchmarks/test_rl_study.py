"""The RL study in its shortest form, and the numbers its tables are made of."""

import json
import math

import pytest

from benchmarks.rl_study import __main__ as rl_study
from benchmarks.rl_study import findings, runs
from benchmarks.rl_study.arms import ARMS, Size

SHOWN = ("GRPO", "Clip-Cov", "EM then GRPO", "ConciseR", "PPL")


def test_the_study_writes_tables_and_picture_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    arguments = ["--seeds", "1", "--updates", "2", "--responses", "16", "--problems", "8"]
    arguments += ["--out", str(tmp_path), "--cache", str(tmp_path / "cache"), "--arms", *SHOWN]
    rl_study.main(arguments)
    text = (tmp_path / "rl_study.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert all(f"| {arm} |" in text for arm in SHOWN)
    study = json.loads((tmp_path / "rl_study.json").read_text())
    for arm, (run,) in study["arms"].items():
        updates = [line["update"] for line in run["lines"]]
        assert updates == list(range(1, len(updates) + 1)), arm
        assert run["points"][-1]["update"] == len(updates) and "greedy" in run["points"][-1]
    stages = [line["stage"] for line in study["arms"]["ConciseR"][0]["lines"]]
    assert stages == [0, 0, 1, 1]
    assert (tmp_path / "rl_study.png").stat().st_size > 30_000
    monkeypatch.setattr(runs, "run_arm", lambda *_: pytest.fail("made again"))
    rl_study.main(arguments)
    assert json.loads((tmp_path / "rl_study.json").read_text()) == study
    (tmp_path / "cache" / "PPL-0.json").unlink()
    rl_study.main([*arguments, "--kept-only"])
    del study["arms"]["PPL"], study["prediction"]["PPL"]
    assert json.loads((tmp_path / "rl_study.json").read_text()) == study


def test_every_arm_has_settings_that_a_run_takes():
    """Of its own: no two arms are one run."""
    made = [runs.study_settings(arm, 0, Size(2, 16, 8, 1)).to_dict() for arm in ARMS]
    assert all(own not in made[:i] for i, own in enumerate(made))
    assert all(own["predict_change"] == "weights" for own in made)


def test_what_was_kept_is_made_again_under_other_settings(tmp_path):
    made = []
    for key in (1, 1, 2):
        runs.cached(tmp_path / "a.json", {"key": key}, lambda: made.append(1))
    assert len(made) == 2


def test_the_law_is_fitted():
    points = [(h, 0.9 - 0.2 * math.exp(h)) for h in (0.1, 0.5, 1.0)]
    law = findings.law(points)
    assert (law["a"], law["b"]) == (pytest.approx(0.2), pytest.approx(0.9))
    assert law["ceiling"] == pytest.approx(0.7) and law["r2"] == pytest.approx(1)
    assert law["residual"] < 1e-9 and law["points"] == 3


def test_prediction_compares_signs_and_correlation():
    lines = [
        dict(zip(findings.PREDICTIONS.values(), (p, -m)), entropy_change=m, cov_mean=-m)
        for p, m in ((1.0, 2.0), (2.0, 4.0), (-1.0, -2.0), (-0.5, -1.0))
    ]
    found = findings.prediction([{"lines": lines}])
    assert found["logits"] == pytest.approx({"correlation": 1, "same_sign": 1, "slope": 2})
    assert found["weights"] == pytest.approx({"correlation": -1, "same_sign": 0, "slope": -1})
    assert found["covariance"]["correlation"] == pytest.approx(1) and found["updates"] == 4


def test_the_forecast_is_of_all_seeds_and_leaves_out_updates_without_rewards():
    def run(shift):
        entropies = [0.5 - 0.03 * i for i in range(15)]
        lines = [
            {"update": i, "mean_entropy": h, "accuracy": 0.9 - 0.2 * math.exp(h), "reward_mean": 0}
            for i, h in enumerate([h + shift for h in entropies])
        ]
        return {"lines": [{"update": 0, "mean_entropy": 9.0}, *lines]}

    found = findings.law_forecast([run(0.0), run(0.02)])
    assert (found["fitted"], found["last"]) == (6, 6)
    assert found["ceiling"]["mean"] == pytest.approx(0.7)
    assert found["predicted"]["mean"] == pytest.approx(found["reached"])
