"""How many examples a property gets: few in `make test`, more in each round of `make fuzz`."""

import os

from hypothesis import HealthCheck, Phase, settings

FACTOR = int(os.environ.get("EM_KERNELS_FUZZ", "1"))
"""Of `make fuzz`: how many times as many."""
_PHASES = (Phase.explicit, Phase.generate)


def examples(count: int) -> settings:
    """Settings of a test that gets `count` examples in `make test`."""
    return settings(
        max_examples=count * FACTOR,
        phases=_PHASES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
