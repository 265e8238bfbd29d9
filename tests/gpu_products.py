"""The GPU ways of the chunk driver, with the GPU's products played by ones on the CPU."""

from typing import NamedTuple

import pytest
import torch

from em_kernels.linear import chunking, products


class Product(NamedTuple):
    """A call of one of the wide products: its operands and where the result went."""

    kind: str
    a: torch.Tensor
    b: torch.Tensor
    out: torch.Tensor


def play_gpu(patch) -> list[Product]:
    """Make the driver take its GPU ways, by a MonkeyPatch; returns the wide products it runs."""
    calls = []

    def mm_wide(a, b, out):
        calls.append(Product("mm", a, b, out))
        assert a.dtype == b.dtype != out.dtype
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))

    def addmm_wide(total, a, b):
        calls.append(Product("addmm", a, b, total))
        assert a.dtype == b.dtype != total.dtype
        total += a.to(total.dtype) @ b.to(total.dtype)

    patch.setattr(products, "is_gpu", lambda x: True)
    patch.setattr(products, "mm_wide", mm_wide)
    patch.setattr(products, "addmm_wide", addmm_wide)
    patch.setattr(products, "adds_to_float32", lambda device, dtype: True)
    return calls


def need_shapes_of_addmm() -> None:
    """Skip where torch, as 2.11, cannot run `addmm` with an `out_dtype` on the meta device."""
    a = torch.empty(2, 2, dtype=torch.bfloat16, device="meta")
    try:
        products.addmm_wide(a.float(), a, a)
    except TypeError as reason:
        pytest.skip(f"this torch has no addmm to float32 on the meta device: {reason}")


def defer_small_chunks(patch, logits_rows: int = 2) -> None:
    """Chunks of more than 2 * logits_rows rows are worth deferring their gradient."""
    patch.setattr(chunking, "GPU_LOGITS_ROWS", logits_rows)
    patch.setattr(chunking, "single_chunk", lambda count, width, spare: None)
    patch.setattr(chunking, "GPU_TILE_ROWS", 1)
    patch.setattr(chunking, "CPU_TILE_ROWS", 1)


def block_small_vocabularies(patch) -> None:
    """A backward pass of several chunks has the vocabulary outermost from 8 columns a block on."""
    patch.setattr(chunking, "COLUMN_TILE", 4)
    patch.setattr(chunking, "LEAST_COLUMNS", 8)
