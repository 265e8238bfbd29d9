"""The Triton backend: the functions of `em_kernels.backends.reference` as GPU kernels.

The package itself is imported where there is no triton, and says why; `backend` needs it.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from pathlib import Path

import torch

from em_kernels.backends.availability import first_line, why_no_gpu
from em_kernels.backends.interface import Backend


def load() -> Backend:
    from em_kernels.backends.triton.backend import Triton

    return Triton()


def why_not(device: torch.device | None) -> str | None:
    try:
        interpreted = importlib.import_module("em_kernels.backends.triton.backend").interpreted
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        remedy = "`pip install triton`" + ("" if missing else " of the version torch asks for")
        return f"it cannot be imported ({first_line(error)}); {remedy}"
    if interpreted:
        return None
    on_cpu = "TRITON_INTERPRET=1 runs it on the CPU"
    if device is not None and device.type == "cpu":
        return f"its tensors must be on a GPU ({on_cpu})"
    if device is None and (said := why_no_gpu()) is not None:
        return f"no GPU is visible{said} ({on_cpu})"
    return _no_launcher()


def _no_launcher() -> str | None:
    """Why Triton cannot build the launcher of its first kernel: it is C, and includes Python.h."""
    compiler = os.environ.get("CC")
    if compiler is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "it builds its launcher with a C compiler; install gcc or clang, or set CC"
    if compiler is not None and not shutil.which(compiler):
        return (
            f"it builds its launcher with a C compiler, and there is no CC={compiler!r}; unset CC"
        )
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton
    folder = sysconfig.get_path("include", scheme)
    if not Path(folder, "Python.h").exists():
        return f"its launcher needs Python.h, which is not in {folder}; install python3-dev"
    return None
