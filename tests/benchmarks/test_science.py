"""The study of the claims: runs that go on where they were, verdicts, and every claim's page."""

import random

import pytest
import torch
from scipy import stats

from benchmarks.science import __main__ as command
from benchmarks.science import runs
from benchmarks.science.arms import ARMS, SWEEP
from benchmarks.science.choices import Choices
from benchmarks.science.claims import CLAIMS, claim_text, seeds
from benchmarks.science.numbers import Interval, Part, apart, change, interval, said
from benchmarks.science.overconfidence import Stop
from benchmarks.science.runs import Size, measured, random_reward, skewness
from benchmarks.science.store import Store
from em_kernels import tiny_math
from em_kernels.lm.rollout import Rollout
from em_kernels.trainer import load_model

SMALL = Size(problems=8, seeds=1, updates=1)


def test_an_arm_is_measured_once_and_goes_on_with_more_seeds(tmp_path, monkeypatch):
    store, said = Store(tmp_path), []
    measured(store, ["em"], SMALL, said.append)
    found = store.runs("em")[0]
    assert [point["update"] for point in found["points"]] == [1]
    assert 0 <= found["points"][0]["accuracy"]["1"] <= 1 and len(said) == 1
    assert len(found["lines"]["mean_entropy"]) == len(found["lines"]["logit_skew"]) == 1
    made = []
    monkeypatch.setattr(runs, "run", lambda arm, seed, *_: made.append(seed) or found)
    measured(store, ["em"], SMALL._replace(seeds=3), said.append)
    assert made == [1, 2] and list(store.runs("em")) == [0, 1, 2]
    monkeypatch.setattr(runs, "settings_of", lambda *_: {"learning_rate": 1.0})
    measured(store, ["em"], SMALL, said.append)
    assert made == [1, 2, 0], "one of other settings is run again"
    with pytest.raises(ValueError, match=r"has runs of .*another folder"):
        measured(store, ["em"], SMALL._replace(problems=9), said.append)


def test_the_command_runs_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "run", lambda *_: {"cpu_seconds": 1.0})
    monkeypatch.setattr(Choices, "prompts", lambda *_: ["a", "b"])
    size = ["--claims", "shots", "--seeds", "1", "--updates", "1", "--data", str(tmp_path)]
    command.main(size)
    assert "by variance, seed 0: 1 s of CPU time" in capsys.readouterr().out
    assert {path.stem for path in tmp_path.iterdir()} == {
        *("untrained", "by-variance", "4-prompts", "10-prompts")
    }


def test_every_arm_of_a_claim_is_there_and_every_arm_has_a_claim():
    needed = {arm for claim in CLAIMS.values() for arm in claim.ARMS}
    assert needed == set(ARMS)
    assert {arm.split for arm in ARMS.values() if "dev" in arm.name} == {"dev"}
    assert {arm.split for arm in ARMS.values() if "dev" not in arm.name} == {"heldout"}


def pretended(folder, gain=0.01) -> Store:
    """Data files of every arm, in which accuracy grows with the updates and the entropy falls."""
    store, rng = Store(folder), random.Random(0)

    def point(arm, update, seed):
        asked = {1.0} | set((1.0, 0.5, 0.0) * (update in arm.full) + SWEEP * (update in arm.sweep))
        right = {f"{t:g}": 0.3 + gain * update + 0.01 * rng.random() for t in asked}
        habits = {habit: 0.5 + 0.01 * seed for habit in ("tidy", "restless", "hasty")}
        shift = {"skew": 1.0 + update + 0.01 * seed, "pooled": 1.0 - update - 0.01 * seed}
        return {"update": update, "accuracy": right, "greedy_by_habit": habits, **shift}

    for name, arm in ARMS.items():
        updates = sorted({*arm.curve, *arm.full, *arm.sweep})
        steps = range(1, arm.updates + 1)
        lines = {"mean_entropy": [0.2 / u for u in steps], "logit_skew": [6.5 + u for u in steps]}
        seeds = range(arm.first_seed, arm.first_seed + 3)
        found = {
            str(seed): {"points": [point(arm, u, seed) for u in updates], "lines": lines}
            for seed in seeds
        }
        store.write(name, {"runs": found})
    return store


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    return folder, pretended(folder / "science")


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_says_first_whether_it_held_and_draws(name, pages, tmp_path):
    folder, store = pages
    text = claim_text(name, folder)
    assert text.startswith("**") and "\n\n| " in text and "nan" not in text
    assert text.endswith("Seeds: 3.")
    CLAIMS[name].draw(store, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_gain_is_held_and_a_loss_is_the_reverse(pages, tmp_path):
    folder, _ = pages
    assert claim_text("gains", folder).startswith("**Held**: sampled, T = 1 (+0.1")
    pretended(tmp_path / "science", gain=-0.01)
    assert claim_text("gains", tmp_path).startswith("**The reverse was found**: sampled, T = 1")


def test_an_arm_of_fewer_seeds_is_named(tmp_path):
    store = Store(tmp_path)
    for arm, number in (("a", 3), ("b", 3), ("c", 2), ("dev", 1)):
        store.write(arm, {"runs": {str(seed): {} for seed in range(number)}})
    assert seeds(store, ("a", "b", "c", "dev")) == "Seeds: 3 (2: c)."


def test_rates_are_the_best_on_dev_problems(tmp_path):
    store = Store(tmp_path)
    for rate, right in (("0.0001", 0.4), ("0.0002", 0.6), ("0.0004", 0.5)):
        runs = {"100": {"points": [{"update": 10, "accuracy": {"1": right}}]}}
        store.write(f"dev, T = 0.5, rate {rate}", {"runs": runs})
    assert Choices(store).rate(0.5) == 2e-4


def test_intervals_are_students():
    values = [0.1, 0.4, 0.35, 0.2]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=0.2625, scale=stats.sem(values))
    assert found == pytest.approx((0.2625, low, high))
    assert change({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.5}).mean == pytest.approx(0.15)
    two = apart(dict(enumerate(values)), {0: 0.1, 7: 0.3})
    expected = stats.ttest_ind(values, [0.1, 0.3], equal_var=False).confidence_interval()
    assert two == pytest.approx((0.0625, expected.low, expected.high))


def test_verdicts_go_by_the_interval():
    up, down, wide = Interval(0.2, 0.1, 0.3), Interval(-0.2, -0.3, -0.1), Interval(0.1, -0.1, 0.3)
    parts = [Part("a", up, 1), Part("b", down, 1), Part("c", wide, 1), Part("d", down, -1)]
    assert [part.verdict for part in parts] == [
        *("Held", "The reverse was found", "Not decided", "Held")
    ]
    assert said(parts[:2]) == (
        "**Held in 1 of 2 parts.** **Held**: a (+0.200 [+0.100, +0.300]). "
        "**The reverse was found**: b (-0.200 [-0.300, -0.100])."
    )
    assert said(parts[:1]) == "**Held**: a (+0.200 [+0.100, +0.300])."
    alone = Part("e", interval([0.5]), 1)
    assert alone.verdict == "Not decided"


def test_stops_end_where_the_trainer_would():
    lines = {"mean_entropy": [0.2, 0.04, 0.06, 0.03, 0.02], "logit_skew": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert Stop(entropy=0.05).at(lines) == 2
    assert Stop(entropy=0.05, patience=2).at(lines) == 5
    assert Stop(skew=2.5).at(lines) == 3
    assert Stop(entropy=0.01).at(lines) == 5 and Stop(after=4).at(lines) == 4


def test_random_reward_gives_every_answer_one_advantage_and_no_entropy_weight():
    mask = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]])
    entropy_weight, weight = random_reward(0)(None, mask)
    assert entropy_weight is None and (weight[mask == 0] == 0).all()
    per_answer = [row[counted == 1].unique() for row, counted in zip(weight, mask)]
    assert all(len(values) == 1 for values in per_answer)
    assert sum(values.item() for values in per_answer) == pytest.approx(0, abs=1e-6)


def test_skewness_is_that_of_the_logits_that_gave_the_answers():
    model, _ = load_model(str(tiny_math.model_path()), "cpu")
    ids = torch.randint(5, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    generated = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]).bool()
    ones = torch.ones_like(generated)
    found = skewness(model, Rollout(ids, ones, generated, torch.tensor([True, True])))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1][generated[:, 1:]].double().numpy()
    assert found["skew"] == pytest.approx(stats.skew(logits, axis=1).mean(), rel=1e-4)
    assert found["pooled"] == pytest.approx(stats.skew(logits.ravel()), rel=1e-3)
