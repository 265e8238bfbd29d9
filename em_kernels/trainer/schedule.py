"""Which objective an update has, and when to stop: decided by the settings and the metrics so far.

Nothing here keeps a state of its own, so a resumed run decides as the uninterrupted one would have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from em_kernels.lm.settings import check_choice, not_negative
from em_kernels.objectives.bonus import next_entropy_coef
from em_kernels.objectives.repo import next_zeta

DEMONSTRATED = ("sft", "eaft")
"""Objectives that are given the answers, and sample none."""
WITHOUT_REWARDS = ("em", "opd", *DEMONSTRATED)
"""Objectives that look at the tokens of the answers alone."""
_STAGE = re.compile(
    r"(?P<names>[^:@\s]+)(?::(?P<updates>[0-9]{1,9}))?"
    r"(?:@(?P<rate>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?))?"
)


class Stage(NamedTuple):
    """Some updates in a row with one objective, or two at once (em and another)."""

    objectives: tuple[str, ...]
    updates: int
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        return "+".join(self.objectives)

    @property
    def policy(self) -> str | None:
        """The objective that needs rewards, if there is one."""
        return next((name for name in self.objectives if name not in WITHOUT_REWARDS), None)

    @property
    def demonstrated(self) -> str | None:
        """The objective that is given the answers, if there is one."""
        return next((name for name in self.objectives if name in DEMONSTRATED), None)

    @property
    def kind(self) -> str:
        """What makes its updates: "rewards", or without them its name ("em", "em+opd", ...)."""
        return self.name if self.policy is None else "rewards"


def parse_schedule(
    text: str, updates: int, known: Sequence[str], setting: str = "schedule"
) -> tuple[Stage, ...]:
    """The stages of e.g. "em:10@2e-4, grpo:40, em+kl_cov": NAME[:UPDATES][@LEARNING_RATE].

    The last stage gets what is left of `updates`; its own number may be left out. "em+NAME" adds
    the mean entropy to the loss of NAME. `setting` is where the text was given, for errors.

    Raises:
        ValueError: an unknown name, a stage without updates, or a sum that does not fit `updates`.
    """
    parts = [part.strip() for part in text.split(",")]
    stages: list[Stage] = []
    for number, part in enumerate(parts, start=1):
        left = updates - _total(stages)
        try:
            stages.append(_stage(part, number == len(parts), left, known))
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from None
    if _total(stages) != updates:
        raise ValueError(
            f"{setting}: {text!r} has {_total(stages)} updates in all, but `updates` is {updates}"
        )
    return tuple(stages)


def _stage(part: str, last: bool, left: int, known: Sequence[str]) -> Stage:
    match = _STAGE.fullmatch(part)
    if match is None:
        raise ValueError(f"expected NAME[:UPDATES][@LEARNING_RATE], got {part!r}")
    names = _split_names(match["names"], known)
    if match["updates"] is None and not last:
        raise ValueError(f"all stages but the last need their updates, got {part!r}")
    updates = left if match["updates"] is None else int(match["updates"])
    if updates < 1:
        raise ValueError(f"a stage must have 1 update or more, got {part!r} ({updates})")
    rate = None if match["rate"] is None else float(match["rate"])
    if rate is not None:
        not_negative("a learning rate", rate)
    return Stage(names, updates, rate)


def _split_names(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """One name, or em and another; a name may itself end in plus signs (grpo++)."""
    names = (text,) if text in known else tuple(text.split("+", 1))
    for name in names:
        check_choice("an objective", name, tuple(known))
    if len(names) == 2 and (names[0] != "em" or names[1] == "em"):
        raise ValueError(f"two objectives at once are em+NAME, got {text!r}")
    return names


def _total(stages: Sequence[Stage]) -> int:
    return sum(stage.updates for stage in stages)


def current_stage(config, lines: Sequence[dict]) -> tuple[int, Stage] | None:
    """(index, stage) of the next update, given the metrics of those before; None after the last.

    A stage ends with its updates, or early where `should_stop` says so.
    """
    index, stages = (lines[-1].get("stage", 0) if lines else 0), config.stages
    own = stage_lines(lines, index)
    if len(own) >= stages[index].updates or should_stop(config, own):
        index += 1
    return (index, stages[index]) if index < len(stages) else None


def stage_lines(lines: Sequence[dict], index: int) -> list[dict]:
    return [line for line in lines if line.get("stage", 0) == index]


def should_stop(config, lines: Sequence[dict]) -> bool:
    """Whether the last `stop_patience` updates of a stage all crossed a threshold.

    Mean entropy below `stop_entropy` (nats), or skewness of the logits above `stop_skew`. EM goes
    on lowering the entropy long after accuracy has peaked; a threshold chosen on a development set
    ends it before.
    """
    recent = lines[-config.stop_patience :]
    if len(recent) < config.stop_patience:
        return False
    low = config.stop_entropy is not None and all(
        line["mean_entropy"] < config.stop_entropy for line in recent
    )
    skewed = config.stop_skew is not None and all(
        line["logit_skew"] > config.stop_skew for line in recent
    )
    return low or skewed


def entropy_coef(
    initial: float, lines: Sequence[dict], *, target: float | None, step: float
) -> float:
    """The coefficient of the entropy bonus for the next update of a stage.

    `initial` throughout without a target; with one, `next_entropy_coef` of the update before.
    """
    if target is None or not lines:
        return initial
    last = lines[-1]
    return next_entropy_coef(last["entropy_coef"], last["mean_entropy"], target=target, step=step)


def next_of_repo(
    initial: float, lines: Sequence[dict], *, target: float | None, minimum: float, maximum: float
) -> float:
    """REPO's zeta for the next update of a stage: `next_zeta` of the update before.

    Without a target, toward the mean entropy of the stage's first update.
    """
    if not lines:
        return initial
    last, target = lines[-1], lines[0]["mean_entropy"] if target is None else target
    bounds = dict(minimum=minimum, maximum=maximum)
    return next_zeta(last["repo_zeta"], last["mean_entropy"], target=target, **bounds)
