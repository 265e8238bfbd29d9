"""Packages that only some parts need, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, install: str) -> ModuleType:
    """The package.

    Raises:
        ImportError: it cannot be imported; says why, and that `pip install INSTALL` brings it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{package} cannot be imported ({error}); `pip install {install}`"
        ) from error
