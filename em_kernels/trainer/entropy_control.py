"""How a stage holds the entropy: the weight of the bonus, and advantages shaped by it.

What steers is decided by the settings and the metrics of the stage's updates so far, of which
nothing here keeps a copy: a resumed run decides as the uninterrupted one would have.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor

from em_kernels.objectives.bonus import COEF_MAX, COEF_MIN
from em_kernels.objectives.entropy_shaping import entropy_advantage
from em_kernels.objectives.repo import repo_advantage
from em_kernels.trainer.batch import Tokens
from em_kernels.trainer.objective_table import TABLE
from em_kernels.trainer.schedule import entropy_coef, next_of_repo

if TYPE_CHECKING:
    from em_kernels.trainer.rl_config import RLConfig

PATIENCE = 10
"""So many updates in a row at a bound, on the wrong side of the target, are said once."""
READS = {"none": (), "repo": ("logprob",), "entropy": ("entropy",)}
"""By the kind of shaping, the statistics of the current policy that it reads."""


class Control(NamedTuple):
    """Of an update: weight of the entropy bonus, and REPO's zeta (None without it)."""

    entropy_coef: float
    zeta: float | None

    def metrics(self) -> dict[str, float]:
        zeta = {} if self.zeta is None else {"repo_zeta": self.zeta}
        return {"entropy_coef": self.entropy_coef, **zeta}


def control_of(config: RLConfig, objective: str, lines: Sequence[dict]) -> Control:
    """Of the next update of a stage; `lines` are the metrics of those before."""
    initial, target = config.setting("entropy_coef", objective), config.entropy_target
    if shaping_of(config, objective) != "repo":
        coef = entropy_coef(initial, lines, target=target, step=config.entropy_step)
        return Control(coef, None)
    zeta = config.repo_zeta
    if config.repo_adaptive:
        bounds = dict(minimum=config.repo_zeta_min, maximum=config.repo_zeta_max)
        zeta = next_of_repo(zeta, lines, target=target, **bounds)
    return Control(initial, zeta)


def shaping_of(config: RLConfig, objective: str) -> str:
    """A kind of `READS`; "none" where an objective has no advantage."""
    name = "advantage_shaping"
    return config.setting(name, objective) if name in TABLE[objective].settings else "none"


def shaped(
    config: RLConfig,
    objective: str,
    tokens: Tokens,
    current: Mapping[str, Tensor],
    zeta: float | None,
) -> Tokens:
    """The tokens with the advantage that the loss has in place of that of the answers.

    Args:
        current: (B, T) each, of the current policy, what `READS` has of the kind.
    """
    inputs = tokens.advantage, tokens.loss_mask
    match shaping_of(config, objective):
        case "repo":
            advantage = repo_advantage(current["logprob"], *inputs, zeta=cast(float, zeta))
        case "entropy":
            alpha, kappa = config.shaping_alpha, config.shaping_kappa
            advantage = entropy_advantage(current["entropy"], *inputs, alpha=alpha, kappa=kappa)
        case _:
            return tokens
    return tokens._replace(advantage=advantage)


def check_target(config: RLConfig, entries: int) -> None:
    """Refuse a target that no distribution over so many entries of the head has.

    Raises:
        ValueError: it is above the entropy of the uniform one.
    """
    most = math.log(entries)
    if config.entropy_target is not None and config.entropy_target > most:
        raise ValueError(
            f"entropy_target must be at most {most:.4g} nats, the entropy of all {entries} entries "
            f"of the model's head being equally likely, got {config.entropy_target!r}: read "
            "mean_entropy in the metrics of a short run, and take a value near it"
        )


def warn_if_stuck(config: RLConfig, objective: str, lines: Sequence[dict]) -> None:
    """Say once that the steered number is at its bound and the target is not reached."""
    repo = shaping_of(config, objective) == "repo"
    target = config.entropy_target
    if repo and target is None and lines and config.repo_adaptive:
        target = lines[0]["mean_entropy"]
    if target is None:
        return
    name, low, high = "entropy_coef", COEF_MIN, COEF_MAX
    if repo:
        name, low, high = "repo_zeta", -config.repo_zeta_max, config.repo_zeta_max
    sides = [_side(line, name, low, high, target) for line in lines[-PATIENCE - 1 :]]
    last = sides[-PATIENCE:]
    spell = len(last) == PATIENCE and last[0] != 0 and len(set(last)) == 1
    if spell and (len(sides) == PATIENCE or sides[0] != last[0]):
        warnings.warn(_stuck(name, last[0], target, lines[-1]), stacklevel=2)


def _side(line: dict, name: str, low: float, high: float, target: float) -> int:
    """-1 where the entropy is below the target and the number cannot raise it further, 1 where it
    is above and the number cannot lower it, else 0."""
    if line["mean_entropy"] < target and line[name] >= high:
        return -1
    return int(line["mean_entropy"] > target and line[name] <= low)


_REMEDIES = {
    ("entropy_coef", -1): "lower the target or the learning rate, or let advantage_shaping='repo' "
    "steer, which acts on the advantages",
    ("entropy_coef", 1): "a bonus only raises the entropy, and has nothing to do before it has "
    "fallen to the target; advantage_shaping='repo' lowers it too",
    ("repo_zeta", -1): "raise repo_zeta_max, or lower the target or the learning rate",
    ("repo_zeta", 1): "raise repo_zeta_max or the target",
}


def _stuck(name: str, side: int, target: float, line: dict) -> str:
    where = "below" if side < 0 else "above"
    return (
        f"entropy_target {target:.4g} is not reached: the mean entropy, {line['mean_entropy']:.4g} "
        f"now, has been {where} it for {PATIENCE} updates in a row with {name} at its bound of "
        f"{line[name]:.4g}: {_REMEDIES[name, side]}"
    )
