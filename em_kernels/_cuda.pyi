"""The compiled CUDA kernels: csrc/cuda/bindings.cpp. Addresses are integers, 0 for none."""

import enum
from collections.abc import Sequence

nvcc: str
architectures: str

class Operation(enum.Enum):
    statistics = ...
    gradient = ...
    loss = ...

class Problem:
    def __init__(
        self,
        *,
        dtype: int,
        logits: int,
        rows: int,
        inner: int,
        outer_stride: int,
        inner_stride: int,
        vocab: int,
        valid_vocab: int,
        bias: int = 0,
        target: int = 0,
        mask: int = 0,
        temperature_rows: int = 0,
        temperature: float = 1.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
    ) -> None: ...

class Results:
    def __init__(self, columns: Sequence[int]) -> None: ...

class Gradient:
    def __init__(
        self,
        *,
        max: int = 0,
        log1p_r: int = 0,
        mean_d: int = 0,
        g_logprob: int = 0,
        g_entropy: int = 0,
        g_lse: int = 0,
        out: int = 0,
        outer_stride: int = 0,
        inner_stride: int = 0,
        out_dtype: int = 0,
    ) -> None: ...

class Device:
    compute_capability: int
    shared_per_block: int
    shared_per_multiprocessor: int
    largest_cluster: int
    multiprocessors: int

def device(index: int) -> Device: ...
def run(
    operation: Operation,
    problem: Problem,
    results: Results,
    gradient: Gradient,
    device: Device,
    stream: int,
    /,
) -> None: ...
def runtime_version() -> int: ...
def why_no_driver() -> str: ...
