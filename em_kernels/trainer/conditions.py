"""When a setting acts: what the others must be, in words that refuse it elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from em_kernels.lm.text import cut

SHOWN = 60


class Condition(NamedTuple):
    """When a setting acts, what it is for in words, and what stands against it."""

    holds: Callable[[Any], bool]
    words: str
    against: Callable[[Any], str]


def on(name: str, words: str, good: Callable[[Any], bool]) -> Condition:
    """Of one other setting."""
    return Condition(
        lambda config: good(getattr(config, name)),
        words,
        lambda config: f"with {name}={short(getattr(config, name))}",
    )


def short(value: Any) -> str:
    return cut(repr(value), SHOWN)


EVERYWHERE = {
    "stop_patience": Condition(
        lambda config: config.stop_entropy is not None or config.stop_skew is not None,
        "a threshold, stop_entropy or stop_skew",
        lambda config: "without one",
    ),
    "vllm_memory": on("sampler", "sampler='vllm'", lambda value: value == "vllm"),
}
"""Of settings that runs of every kind have."""


def idle(config: Any, name: str, default: Any, condition: Condition) -> str | None:
    """What a setting that does not act is for, and what was received; None where it acts or is
    left alone."""
    value = getattr(config, name)
    if value == default or condition.holds(config):
        return None
    return f"{condition.words}, got {short(value)} {condition.against(config)}"
