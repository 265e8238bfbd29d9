"""The entropy law of a run's first updates against where the run ends."""

import json
import math
import random

import pytest
from evaluations import letters, save_bigrams, sure, write_rows
from scipy.stats import linregress, t

from em_kernels import cli
from em_kernels.analysis.law import forecast, predict_ceiling, split_run
from em_kernels.evaluator import EvalConfig, run_eval


def run_of(number=20, a=0.5, b=1.2, noise=0.0, seed=0):
    """A run whose entropy falls from 0.6 to 0.05, with the law and noise around it."""
    draw = random.Random(seed)
    entropies = [0.05 + 0.55 * math.exp(-4 * i / number) for i in range(number)]
    law = [b - a * math.exp(h) + noise * draw.gauss(0, 1) for h in entropies]
    return [(f"update {i}", h, r) for i, (h, r) in enumerate(zip(entropies, law), start=1)]


def test_the_first_fifth_of_a_law_tells_ceiling_and_end():
    points = run_of()
    found = predict_ceiling(points)
    assert (found["fitted"], found["last"], found["share"]) == (4, 4, 0.2)
    assert found["ceiling"]["mean"] == pytest.approx(0.7)
    assert found["ceiling"]["low"] == pytest.approx(found["ceiling"]["high"])
    ends = [r for *_, r in points[-4:]]
    assert found["reached"] == pytest.approx(sum(ends) / 4) == found["predicted"]["mean"]
    assert found["points"] == [[h, r] for _, h, r in points[:4]]


def test_intervals_are_those_of_linear_regression():
    """The line's from the standard error of its intercept, with x moved to where it is asked."""
    first, last = split_run(run_of(noise=0.02), 0.3)
    found, k = forecast(first, last), len(first)
    for name, place, more in (
        ("ceiling", 1.0, 0.0),
        ("predicted", sum(math.exp(h) for _, h, _ in last) / len(last), 1 / len(last)),
    ):
        fit = linregress([math.exp(h) - place for _, h, _ in first], [r for *_, r in first])
        own = [fit.intercept + fit.slope * (math.exp(h) - place) for _, h, _ in first]
        residual = sum((r - o) ** 2 for (*_, r), o in zip(first, own)) / (k - 2)
        width = t.ppf(0.975, k - 2) * math.sqrt(fit.intercept_stderr**2 + more * residual)
        mean, low, high = (found[name][key] for key in ("mean", "low", "high"))
        assert mean == pytest.approx(fit.intercept)
        assert (mean - low, high - mean) == pytest.approx((width, width))


def test_the_interval_holds_the_end_as_often_as_it_says():
    inside = [predict_ceiling(run_of(noise=0.02, seed=seed))["inside"] for seed in range(400)]
    assert sum(inside) / 400 == pytest.approx(0.95, abs=0.04)


def test_a_run_that_leaves_its_law_is_outside():
    points = run_of(noise=1e-3)
    bent = [*points[:10], *[(name, h, r - 0.3) for name, h, r in points[10:]]]
    assert not predict_ceiling(bent)["inside"] and predict_ceiling(points, 0.5)["last"] == 10
    assert predict_ceiling(points, 0.8)["last"] == 4


@pytest.mark.parametrize(
    "share, words",
    [
        (0.0, "above 0 and below 1, got 0.0"),
        (1.0, "above 0 and below 1, got 1.0"),
        (math.nan, "above 0 and below 1"),
        (0.1, "share=0.1 of 20 points is 2"),
        (0.99, "of 20 points is 20"),
    ],
)
def test_bad_shares(share, words):
    with pytest.raises(ValueError, match=words):
        predict_ceiling(run_of(), share)


def test_first_points_of_one_entropy_determine_no_line():
    with pytest.raises(ValueError, match="two of them different"):
        predict_ceiling([("", 0.5, 0.1)] * 4 + run_of()[4:])


def test_analyze_law_predicts_each_run(tmp_path, capsys):
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        rows = [
            {"update": u, "mean_entropy": h, "accuracy": r}
            for u, (_, h, r) in enumerate(run_of(noise=0.01, seed=seed), start=1)
        ]
        write_rows(folder / "metrics.jsonl", rows)
    given = ["analyze", "law", *map(str, folders), "--output", str(tmp_path / "law")]
    assert cli.main([*given, "--first", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "predicted from the first 20% of the updates" in printed
    rows = json.loads((tmp_path / "law" / "law.json").read_text())["forecasts"]
    assert [row["run"] for row in rows] == list(map(str, folders))
    for row in rows:
        assert row["run"] in printed and f"{row['predicted']['mean']:.3f} [" in printed
    assert (tmp_path / "law" / "law.png").stat().st_size > 10_000
    assert cli.main([*given, "--first", "0.1"]) == 2
    assert f"{folders[0]}: --first 0.1 of 20 points is 2" in capsys.readouterr().err


def test_first_is_for_runs(tmp_path, capsys):
    """Points of an evaluation have no order."""
    path = write_rows(tmp_path / "problems.jsonl", letters(2))
    model = save_bigrams(tmp_path / "model", sure(0.6))
    run_eval(EvalConfig(model, path, tmp_path / "eval", samples=2), progress=False)
    assert cli.main(["analyze", "law", str(tmp_path / "eval"), "--first", "0.2"]) == 2
    assert f"for training runs, {tmp_path / 'eval'} has no metrics" in capsys.readouterr().err
