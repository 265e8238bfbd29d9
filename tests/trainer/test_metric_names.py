"""The table of metrics in docs/trainer.md: every name that is logged, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rl_runs import rl_settings, run_rl
from tiny_qwen2 import make_model
from trainer_runs import run, settings

from em_kernels.trainer.rl_config import OBJECTIVES
from em_kernels.trainer.schedule import WITHOUT_REWARDS

PAGE = Path(__file__).parents[2] / "docs" / "trainer.md"
SMALL = dict(updates=1, responses=4, max_new_tokens=12)
REWARDS = {"grpo++": "random"}
"""Of objectives that do not take the length of an answer."""


def table() -> list[str]:
    """The names of the first column."""
    section = PAGE.read_text().partition("\n## Metrics\n")[2]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def logged(**changes) -> set[str]:
    config = rl_settings(**{**SMALL, **changes})
    teacher = dict(teacher=make_model(5)) if "opd" in str(changes.values()) else {}
    return {name for line in run_rl(config, **teacher).metrics for name in line}


def by_name(objective: str) -> set[str]:
    if objective in WITHOUT_REWARDS:
        return logged(objective=objective)
    reward = REWARDS.get(objective, "length")
    return logged(objective=objective, group_size=2, reward=reward)


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    """What short runs log, by what they are."""
    em = settings(**SMALL, stop_skew=1e9, prompts="1 2")
    runs = {"em, to a skewness": {name for line in run(em).metrics for name in line}}
    runs |= {objective: by_name(objective) for objective in OBJECTIVES}
    runs["a reference"] = logged(group_size=2, ref_kl=0.1)
    cut = dict(top_p=0.7, rollout_correction="icepop", predict_change="weights")
    runs["weights"] = logged(group_size=2, **cut)
    stages = dict(schedule="em:1,em+grpo:1,em+opd", updates=3, group_size=2, reward="length")
    return {**runs, "stages": logged(**stages)}


def test_every_metric_that_is_logged_is_in_the_table(found):
    missing = {what: sorted(names - set(table())) for what, names in found.items()}
    assert {what: names for what, names in missing.items() if names} == {}


def test_every_metric_in_the_table_is_logged(found):
    assert len(set(table())) == len(table())
    assert set(table()) - set().union(*found.values()) == set()
