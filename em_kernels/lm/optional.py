"""Packages that only some parts need, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(package: str, install: str, instead: str = "") -> ModuleType:
    """The package.

    Raises:
        ImportError: it cannot be imported; says why, that `pip install INSTALL` brings it, and what
            does `instead`.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        remedy = f"`pip install {install}`" + (f", or {instead}" if instead else "")
        raise ImportError(f"{package} cannot be imported ({error}); {remedy}") from error
