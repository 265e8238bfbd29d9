"""The CUDA kernels on a GPU keep the contract of a backend."""

import pytest
import torch
from contract import Contract, Subject
from helpers import IMPLS

from em_kernels.backends.choice import backend

pytestmark = pytest.mark.skipif("cuda" not in IMPLS, reason="needs a GPU and the CUDA part")


class TestCudaDevice(Contract):
    IMPLS, LENGTHS, LONG = ("cuda",), (1, 7, 8, 33, 1000, 4097, 65536), 40_011
    PLACES = (0, 1023, 20_000, 40_010)

    @pytest.fixture
    def subject(self, impl):
        return Subject(backend(impl, torch.device("cuda")), "cuda")
