"""What every backend gives, case by case.

The test file of a backend makes a class of `Contract`, which names its subjects and the sizes at
which its blocks end, and gives the fixture `subject`; what is particular to a backend stays in its
file. How close to the truth a result must be is said in closeness.py.
"""

from __future__ import annotations

from typing import ClassVar

from contract.edges import Edges
from contract.memory import Memory
from contract.sizes import Sizes
from contract.subject import DTYPES, Subject
from contract.values import Values

__all__ = ["Contract", "Subject"]


class Contract(Values, Edges, Memory, Sizes):
    IMPLS: ClassVar[tuple[str, ...]]  # the subjects' names
    LENGTHS: ClassVar[tuple[int, ...]]  # rows that end before, with and after a block, a vector
    LONG: ClassVar[int]  # several blocks, the last of which is not full
    PLACES: ClassVar[tuple[int, ...]]  # in a row of LONG: its ends, the ends of blocks
    SAMPLE: ClassVar[float] = 1.0  # the share of the cases that is run, where a backend is slow

    def pytest_generate_tests(self, metafunc):
        values = {"impl": self.IMPLS, "vocab": self.LENGTHS, "place": self.PLACES}
        values |= {"dtype": DTYPES, "float_dtype": DTYPES[:2]}
        for name, given in values.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, given, ids=lambda value: str(value).split(".")[-1])
