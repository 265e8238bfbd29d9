"""Numbers kept in fewer bits than they are computed in, rounded so that the mean is right.

A number between two neighbours becomes the upper one with the probability that its distance from
the lower one is of the distance between the two, else the lower one.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256  # values that share a scale


def round_to(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 numbers as bfloat16, at random; in another dtype to the nearest."""
    if dtype != torch.bfloat16 or x.dtype != torch.float32:
        return x.to(dtype)
    bits = torch.randint(
        1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator
    )  # added to those that are dropped, they carry as often as there is left to the next number
    return bits.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)


@cache
def dynamic_map(signed: bool) -> Tensor:
    """256 numbers in [-1, 1] or [0, 1], ascending: the dynamic map of Dettmers et al.
    (arXiv:2110.02861, section 1.3), as bitsandbytes and torchao have it.

    The centres of 2^i equal parts of [0.1, 1] (of 2^(i + 1) without signs), times 10^(i - 6), for i
    from 0 to 6; with signs their negatives; 0 and 1.
    """
    found = [0.0, 1.0]
    for i in range(7):
        parts = 2 ** (i if signed else i + 1)
        centres = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / parts) for j in range(parts)]
        found += [*centres, *(-x for x in centres)] if signed else centres
    return torch.tensor(sorted(found))


def read_codes(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 numbers (N,) of their codes (N,), uint8, and the scale of each block."""
    values = dynamic_map(signed).to(codes.device)[codes.int()]
    return values.mul_(scales.repeat_interleave(BLOCK)[: len(values)])


def write_codes(
    x: Tensor, codes: Tensor, scales: Tensor, signed: bool, generator: torch.Generator
) -> None:
    """The codes and scales of float32 numbers (N,), at random between neighbours.

    A block's scale takes its largest absolute value to the end of the map, of its negative side
    where there is one, which is shorter.
    """
    table = dynamic_map(signed).to(x.device)
    blocks = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scales.copy_(blocks.abs().amax(1) / (-table[0] if signed else 1))
    smallest = torch.finfo(torch.float32).tiny
    shares = (blocks / scales.clamp(min=smallest)[:, None]).view(-1)[: len(x)]
    lower = torch.bucketize(shares, table, out_int32=True, right=True).sub_(1).clamp_(0, 254)
    below = table[lower]
    up = (shares - below).div_(table[lower + 1] - below)
    chance = torch.rand(x.shape, device=x.device, generator=generator)
    codes.copy_(lower + (chance < up))
