"""Which rows have no finite logit: a shard of a vocabulary tells them from rows with a NaN."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from em_kernels.backends.interface import RowSpec
from em_kernels.backends.triton.launch import Rows, device_of, numbers, prepare
from em_kernels.backends.triton.logit_moments import INF
from em_kernels.backends.triton.reads import load_u, row_constants, row_of


@triton.jit
def presence(
    logits,
    view,
    rows,
    top,
    found,
    valid,
    by: tl.float64,
    softcap: tl.float64,
    gain: tl.float64,
    how,
):
    row = tl.program_id(0)
    asked = row >= 0
    if top is not None:
        value = tl.load(top + row)
        asked = value != value
    count = tl.full((), -1, tl.int32)
    if asked:
        x = row_of(logits, row, view, how)
        constants = row_constants(row, rows, by, softcap, gain, how)
        present = tl.zeros((how.block,), tl.int32)
        for start in range(0, valid, how.block):
            u, _ = load_u(x, rows, 0, start, valid - start, constants, how)
            present += tl.where(u == -INF, 0, 1)
        count = tl.sum(present, 0)
    tl.store(found + row, count)


def count_present(logits: Tensor, spec: RowSpec, top: Tensor | None) -> Tensor:
    """As `vocab_parallel.count_present`; a row whose `top` is no NaN is not read."""
    count = logits.shape[0] * logits.shape[1]
    found = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count == 0:
        return found
    with device_of(logits):
        presence[(count,)](
            logits,
            rows=Rows(spec.bias, None, None, spec.temperature_rows),
            top=top,
            found=found,
            valid=spec.valid_vocab,
            **numbers(spec),
            **prepare(logits, spec, ()),
        )
    return found
