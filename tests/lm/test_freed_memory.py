"""What is freed goes back to the system, though something that stays lies behind it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from em_kernels.lm.freed_memory import give_back_freed

BLOCKS, MB = 32, 1 << 20
PROGRAM = f"""
import sys
import torch
from benchmarks.common import resident
from em_kernels.lm.freed_memory import give_back_freed

torch.ones(30 * {MB}, dtype=torch.uint8)  # freed: glibc's own threshold is that now
if sys.argv[1] == "given":
    give_back_freed()
pairs = [[torch.ones(n, dtype=torch.uint8) for n in (8 * {MB}, {MB} // 4)] for _ in range({BLOCKS})]
most = resident("VmRSS")
stays = [small for _, small in pairs]
del pairs
print(most - resident("VmRSS"))
"""


def given_back(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_blocks_go_back_to_the_system():
    # In a process of its own: it is for the whole of one.
    if given_back("kept") > BLOCKS * 4 * MB:
        pytest.skip("this C library gives them back by itself")
    assert given_back("given") > BLOCKS * 7 * MB


def test_where_the_c_library_has_no_such_thing(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert give_back_freed() is False
