"""The arms of the study: the same optimiser, batch and problems, another objective or reward.

Settings of Clip-Cov, KL-Cov and the entropy target were chosen on problems of the "dev" split; all
others are the defaults of their objectives, which are the published ones.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from em_kernels import tiny_math
from em_kernels.trainer import RLConfig

UPDATES = 24
EM_UPDATES = 10
PRACTICE = 2000
EM = f"em:{{em_updates}}@{tiny_math.EM_LEARNING_RATE:g}"

ARMS = {
    "GRPO": dict(objective="grpo"),
    "Clip-Cov": dict(objective="clip_cov", ratio=0.03, cov_lower=0.2, cov_upper=20.0),
    "KL-Cov": dict(objective="kl_cov", ratio=0.1),
    "80/20": dict(objective="high_entropy"),
    "entropy target": dict(
        objective="entropy_bonus", entropy_coef=0.0, entropy_target=0.1, entropy_step=0.05
    ),
    "random reward": dict(objective="grpo", reward="random"),
    "EMPO": dict(objective="empo"),
    "majority vote": dict(objective="grpo", reward="majority"),
    "EM then GRPO": dict(schedule=f"{EM},grpo:{{updates}}"),
    "GRPO then EM": dict(schedule=f"grpo:{{updates}},{EM}"),
    "ConciseR": dict(schedule="grpo++:{updates},l-grpo:{updates}"),
    "Dr. GRPO": dict(objective="dr_grpo"),
    "CISPO": dict(objective="cispo"),
    "GSPO": dict(objective="gspo"),
    "SAPO": dict(objective="sapo"),
    "DPPO": dict(objective="dppo"),
    "REPO-R": dict(objective="repo"),
    "entropy advantage": dict(objective="entropy_advantage"),
    "entropy bonus": dict(objective="entropy_bonus"),
    "PPL": dict(objective="ppl"),
}
"""`bnpo` and `gspo_token` are not among them: without several processes, and with one advantage an
answer, they are GRPO and GSPO."""
ONE_OBJECTIVE = tuple(arm for arm, own in ARMS.items() if "schedule" not in own)


class Size(NamedTuple):
    """How much is run: updates of each stage with rewards, answers an update, problems, seeds."""

    updates: int
    responses: int
    problems: int
    seeds: int

    @property
    def em_updates(self) -> int:
        return min(EM_UPDATES, self.updates)


def settings(arm: str, seed: int, size: Size) -> RLConfig:
    """The run of an arm; the same optimiser, batch and problems for all."""
    own, total = dict(ARMS[arm]), size.updates
    if "schedule" in own:
        own["schedule"] = own["schedule"].format(updates=size.updates, em_updates=size.em_updates)
        total = sum(int(number) for number in re.findall(r":(\d+)", own["schedule"]))
    problems = tiny_math.make_problems("pretrain", PRACTICE, seed=11)
    common = dict(
        problems=tuple((p.text, str(p.answer)) for p in problems),
        prompts=(tiny_math.PROMPT,) if "em:" in own.get("schedule", "") else (),
        updates=total,
        responses=size.responses,
        group_size=8,
        micro_batch=64,
        minibatches=4,
        learning_rate=5e-5,
        max_new_tokens=tiny_math.MAX_NEW_TOKENS,
        judge="exact",
        device="cpu",
        seed=seed,
    )
    return RLConfig(**{**common, **own})
