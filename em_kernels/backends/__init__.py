"""Where rows of logits become statistics and gradients: one module or folder a backend.

Called, `em_kernels.backends()`, it says what is built and usable here: backend name -> "available",
or why not and the remedy.
"""

import sys
from types import ModuleType


class _Room(ModuleType):
    """The package is also the public function of its name: whichever is meant is found."""

    def __call__(self) -> dict[str, str]:
        """What is built and usable here: backend name -> "available", or why not and the remedy."""
        from em_kernels.backends.choice import backends

        return backends()


sys.modules[__name__].__class__ = _Room
