"""The arms: what is trained, how, from which model, and what is measured of it on the way.

Settings were chosen on dev problems, by the arms whose `split` is "dev"; all others are measured on
held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.rl_study import arms as rl_study
from em_kernels import tiny_math
from em_kernels.tiny_math.demo import em_config
from em_kernels.trainer import TrainConfig

if TYPE_CHECKING:
    from benchmarks.science.choices import Choices

SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
"""Sampling temperatures of the sweeps."""
DIFFUSE, HABITS = "diffuse", "habits"
"""The models that are trained, by their names in `tiny_math.model_path`."""
TRAINING_TEMPERATURES = (0.25, 0.5, 0.75, 1.0, 1.5)
RATES = (1e-4, 2e-4, 4e-4)
DENSE = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50)
SELECTIONS = ("variance", "entropy", "margin", "random")
PROMPTS = 10
"""How many prompts each way of selecting gives."""
ONLY_WATCHED = 1e6
"""A threshold that no skewness reaches: with it the trainer writes the skewness down."""


Settings = Callable[[int, "Choices"], dict]
"""(seed, what was chosen on dev problems) -> what differs from `em_config`."""


@dataclass(frozen=True)
class Arm:
    """One arm; an update that is in a tuple is measured so, 0 being the untrained model.

    Args:
        settings: of EM; not of an arm with `stages`.
        stages: an arm of `rl_study` in place of EM.
        random_reward: a policy gradient on rewards drawn by a coin in place of EM.
        curve: accuracy at T = 1, and the moments of the logits.
        full: accuracy at T = 0.5 and greedy too.
        sweep: accuracy at every temperature of `SWEEP` too.
    """

    name: str
    updates: int
    settings: Settings = field(default=lambda seed, chosen: {})
    stages: str | None = None
    random_reward: bool = False
    base: str = DIFFUSE
    split: str = "heldout"
    curve: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    sweep: tuple[int, ...] = ()
    seeds: int = 10
    first_seed: int = 0

    def em(self, seed: int, updates: int, chosen: Choices) -> TrainConfig:
        own = self.settings(seed, chosen)
        return em_config(seed=seed, updates=updates, stop_skew=ONLY_WATCHED, **own)


def _outside(seed: int, chosen: Choices) -> dict:
    return {"prompts": (tiny_math.OUTSIDE_PROMPT,)}


def _at(temperature: float, rate: float | None = None) -> Settings:
    def settings(seed: int, chosen: Choices) -> dict:
        at = dict(loss_temperature=temperature, sampling_temperature=temperature)
        return {**at, "learning_rate": rate or chosen.rate(temperature)}

    return settings


def _selected(way: str, number: int = 1) -> Settings:
    """Of the prompts that it selected, that many from the seed's on, counted round."""

    def settings(seed: int, chosen: Choices) -> dict:
        found = chosen.prompts(way)
        return {"prompts": tuple(found[(seed + i) % len(found)] for i in range(number))}

    return settings


def rate_arm(temperature: float, rate: float) -> str:
    return f"dev, T = {temperature:g}, rate {rate:g}"


def temperature_arm(temperature: float) -> str:
    return f"trained at T = {temperature:g}"


_TEN = dict(curve=(10,), full=(10,))
_DEV = dict(split="dev", first_seed=100, curve=DENSE)
_ONE_SHOT = [
    Arm("untrained", 0, full=(0,), sweep=(0,)),
    Arm("em", 50, curve=DENSE, full=(5, 10, 50), sweep=(10,)),
    Arm("em, dev", 50, seeds=3, **_DEV),
    Arm("outside prompt", 10, _outside, **_TEN),
    Arm("random reward", 10, random_reward=True, **_TEN),
]
_OF_HABITS = [
    Arm("untrained, habits", 0, base=HABITS, full=(0,)),
    Arm("em, habits", 30, base=HABITS, curve=(2, 5, 10, 30), full=(2, 5, 10, 30)),
    Arm("outside prompt, habits", 10, _outside, base=HABITS, **_TEN),
    Arm("random reward, habits", 10, base=HABITS, random_reward=True, **_TEN),
]
_BY_TEMPERATURE = [
    *(
        Arm(rate_arm(t, rate), 10, _at(t, rate), split="dev", curve=(10,), seeds=3, first_seed=100)
        for t in TRAINING_TEMPERATURES
        for rate in RATES
    ),
    *(Arm(temperature_arm(t), 10, _at(t), **_TEN) for t in TRAINING_TEMPERATURES),
]
_BY_PROMPT = [
    *(Arm(f"by {way}", 10, _selected(way), curve=(10,)) for way in SELECTIONS),
    Arm("4 prompts", 10, _selected("variance", 4), curve=(10,)),
    Arm("10 prompts", 10, _selected("variance", 10), curve=(10,)),
]
_RL, _EM = rl_study.UPDATES, rl_study.EM_UPDATES
_ORDERS = [
    Arm(
        "GRPO then EM",
        _RL + _EM,
        stages="GRPO then EM",
        curve=(8, 16, _RL, _RL + _EM),
        full=(_RL, _RL + _EM),
        sweep=(_RL,),
        seeds=5,
    ),
    Arm(
        "EM then GRPO",
        _EM + _RL,
        stages="EM then GRPO",
        curve=(_EM, _EM + 8, _EM + 16, _EM + _RL),
        full=(_EM, _EM + _RL),
        seeds=5,
    ),
]
ARMS = {
    arm.name: arm
    for arm in (
        *_ONE_SHOT,
        *_OF_HABITS,
        *_ORDERS,
        *_BY_PROMPT,
        *_BY_TEMPERATURE,
    )
}
