"""What steers the entropy: decided by settings and metrics, refused where it cannot be, and said
where it does not get there."""

import math
import re
import warnings

import pytest
from rl_runs import rl_settings, run_rl
from tiny_qwen2 import WORDS

from em_kernels.trainer.entropy_control import PATIENCE, Control, control_of, warn_if_stuck

REPO, BONUS = "repo", "entropy_bonus"


def lines_of(name, *pairs):
    """(number, mean entropy) of every update so far"""
    return [{name: number, "mean_entropy": entropy} for number, entropy in pairs]


def repo(**changes):
    return rl_settings(objective=REPO, **changes)


def test_zeta_holds_the_entropy_of_the_first_update():
    config = repo(repo_zeta=1e-3)
    assert control_of(config, REPO, []) == Control(0.0, 1e-3)
    lines = lines_of("repo_zeta", (1e-3, 0.5))
    assert control_of(config, REPO, lines).zeta == 1e-3
    assert control_of(config, REPO, lines + lines_of("repo_zeta", (1e-3, 0.4))).zeta == 2e-3
    assert control_of(config, REPO, lines + lines_of("repo_zeta", (1e-3, 0.6))).zeta == 5e-4


def test_a_target_takes_its_place_and_the_bounds_are_those_given():
    config = repo(entropy_target=0.3, repo_zeta_min=0.01, repo_zeta_max=0.03, repo_zeta=0.02)
    assert control_of(config, REPO, lines_of("repo_zeta", (0.02, 0.2))).zeta == 0.03
    assert control_of(config, REPO, lines_of("repo_zeta", (0.01, 0.4))).zeta == -0.01
    fixed = repo(repo_adaptive=False, repo_zeta=-0.02)
    assert control_of(fixed, REPO, lines_of("repo_zeta", (-0.02, 0.2))).zeta == -0.02


def test_where_repo_is_steered_the_bonus_stays():
    config = repo(entropy_target=0.3, entropy_coef=0.02)
    line = {"entropy_coef": 0.02, "repo_zeta": 1e-3, "mean_entropy": 0.1}
    assert control_of(config, REPO, [line]) == Control(0.02, 2e-3)
    bonus = rl_settings(objective=BONUS, entropy_target=0.3)
    assert control_of(bonus, BONUS, [line]) == Control(0.025, None)


def said(config, objective, lines) -> list[str]:
    """What the updates after each of the lines warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(len(lines) + 1):
            warn_if_stuck(config, objective, lines[:number])
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(
    ("objective", "number", "entropy", "words"),
    [
        (BONUS, 1.0, 0.1, "has been below it .* with entropy_coef at its bound of 1: lower the"),
        (BONUS, 0.0, 0.5, "has been above it .* with entropy_coef at its bound of 0: a bonus only"),
        (REPO, 0.05, 0.1, "has been below it .* with repo_zeta at its bound of 0.05: raise repo_z"),
        (REPO, -0.05, 0.5, "has been above it .* with repo_zeta at its bound of -0.05: raise"),
    ],
)
def test_a_number_at_its_bound_for_long_is_said_once(objective, number, entropy, words):
    config = rl_settings(objective=objective, entropy_target=0.3)
    name = "repo_zeta" if objective == REPO else "entropy_coef"
    held = lines_of(name, (number / 2, entropy)) + lines_of(name, (number, entropy)) * PATIENCE
    held[0][name] = 0.02
    assert said(config, objective, held[:-1]) == []
    (message,) = said(config, objective, held + held[-1:] * 5)
    assert message.startswith(f"entropy_target 0.3 is not reached: the mean entropy, {entropy} now")
    assert re.search(words, message)
    reached = held[:-1] + lines_of(name, (number, 0.3))
    assert said(config, objective, reached) == []


def test_the_entropy_of_the_first_update_may_be_what_is_not_reached():
    lines = lines_of("repo_zeta", (0.001, 0.5), *[(0.05, 0.2)] * PATIENCE)
    (message,) = said(repo(), REPO, lines)
    assert "entropy_target 0.5 is not reached" in message
    assert said(repo(repo_adaptive=False), REPO, lines) == []


def test_without_a_target_nothing_is_said():
    lines = lines_of("entropy_coef", *[(1.0, 0.1)] * 2 * PATIENCE)
    assert said(rl_settings(), "grpo", lines) == []


@pytest.mark.parametrize("objective", [REPO, BONUS, "grpo"])
def test_a_target_above_that_of_the_vocabulary_is_refused_at_once(objective, tmp_path):
    most = math.log(len(WORDS))
    config = dict(objective=objective, output=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"entropy_target must be at most 3.258 nats, .* got 3.3"):
        run_rl(rl_settings(**config, entropy_target=3.3))
    assert not (tmp_path / "run").exists()
    run_rl(rl_settings(**config, entropy_target=most - 1e-6, updates=1, responses=5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(entropy_target=-0.1), "entropy_target must be 0 or more and finite, got -0.1"),
        (dict(repo_zeta_min=0.1), "repo_zeta_min must be at most repo_zeta_max, got 0.1 and 0.05"),
        (dict(repo_zeta_min=0.0), "repo_zeta_min must be positive and finite, got 0.0"),
        (dict(repo_zeta=math.inf), "repo_zeta must be a number and finite, got inf"),
        (
            dict(advantage_shaping="entropy", shaping_kappa=1.0),
            "shaping_kappa must be above 1 and finite, got 1.0",
        ),
        (dict(advantage_shaping="clip"), "advantage_shaping must be one of"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        repo(**changes)


def test_shaping_moves_the_entropy_the_way_it_says():
    """The same answers in the first update, rare tokens with more or less of the advantage."""
    found = {}
    for zeta in (0.4, -0.4):
        config = repo(repo_zeta=zeta, repo_adaptive=False, updates=1, learning_rate=1e-3)
        found[zeta] = run_rl(config).metrics[0]
    assert found[0.4]["mean_entropy"] == found[-0.4]["mean_entropy"]
    assert found[0.4]["entropy_change"] > found[-0.4]["entropy_change"]
    assert found[0.4]["predicted_entropy_change"] > found[-0.4]["predicted_entropy_change"]
