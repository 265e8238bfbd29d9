"""Compile the Triton kernels for GPUs that are not here and report what the machine code uses.

    python tests/triton_offline.py            prints the report as JSON
    python tests/triton_offline.py --write    also renews tests/triton_resources.json

The kernels are compiled through their launchers, with the arguments a call on a GPU would give
them; only the launch itself is left out.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface
from triton_cases import calls, cases, scaled
from triton_code import fused_differences, report

from em_kernels.backends.triton import launch

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).with_name("triton_resources.json")


class Target:
    """What Triton asks of a GPU driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def only_ptx() -> Iterator[None]:
    """What comes after it is left out, and what is made is kept apart from whole kernels."""

    def hook(*compilation):
        if not compilation:
            return "ptx", "ptx"  # by which it is told from the whole
        compilation[1]["cubin"] = lambda ptx, metadata: b""

    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        knobs.cache.dir = str(Path(knobs.cache.dir) / "only-ptx")
        yield


def fusing() -> dict[str, list[str]]:
    """What `fused_differences` finds where the compiler may fuse: the check checked."""
    with patch.dict(launch.UNFUSED, enable_fp_fusion=True):
        return {
            name: fused_differences(compiled(call)[0])
            for name, call in scaled(driver.active.get_current_device())
            if name.endswith("-temperature")
        }


def compiled(call: Callable) -> list:
    """The kernels that `call` would launch."""
    kernels = []

    def capture(kernel, grid):
        return lambda *args, **kwargs: kernels.append(kernel.warmup(*args, grid=grid, **kwargs))

    with patch.object(KernelInterface, "__getitem__", capture):
        call()
    return kernels


class AMD(Target):
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64)


def on_amd() -> dict:
    """Loads and stores of 16 bytes, and barriers."""
    driver.set_active(AMD(942))
    words = ("_load_dwordx4", "_store_dwordx4", "s_barrier")
    return {
        name: [kernel.asm["amdgcn"].count(word) for word in words]
        for name, call in calls(torch.bfloat16, False, ("logprob", "entropy"))
        for kernel in compiled(call)
    }


def main() -> None:
    found, fused = {}, {}
    for arch in ARCHITECTURES:
        driver.set_active(Target(arch))
        found[f"sm_{arch}"] = {
            name + "-finish" * i: report(kernel, name)
            for name, call in cases(arch)
            for i, kernel in enumerate(compiled(call))
        }
        with only_ptx():
            fused[f"sm_{arch}"] = {
                name + "-finish" * i: [kernel.metadata.enable_fp_fusion, fused_differences(kernel)]
                for name, call in scaled(arch)
                for i, kernel in enumerate(compiled(call))
            }
    with only_ptx():
        fuses = fusing()
    print(json.dumps({"kernels": found, "fused": fused, "fusing": fuses, "amd": on_amd()}))
    if "--write" in sys.argv:
        table = {
            "registers, stack bytes": lambda r: [r["registers"], r["stack"]],
            "instructions an entry, bytes a load, a store": lambda r: r["cost"],
            "instructions, products of a step along D, shared bytes": lambda r: r["step"],
        }
        for title, row in table.items():
            table[title] = {
                arch: {name: row(r) for name, r in kernels.items() if row(r)}
                for arch, kernels in found.items()
            }
        text = json.dumps({"triton": triton.__version__, **table}, indent=1)
        text = re.sub(r"\[\s+|\s+\]|(?<=\d,)\s+(?=\d)", lambda m: m[0].strip() or " ", text)
        TABLE.write_text(text + "\n")


if __name__ == "__main__":
    main()
