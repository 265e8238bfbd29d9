"""The forward pass with the vocabulary outermost: the logits of a chunk, C columns at a time.

For a backend that can go through rows in parts. A chunk is all rows, as a rule: their products read
the weight once, and rearrange it once, where those of many small chunks would once a chunk.

Where the loss of a row is w logprob_y or w lse, and only dX is wanted, that is made on the way,
before the sums over the whole row are known. With z = c u (`backends/units.py`), m the largest u so
far and s_v = dz_v / dx_v,

    A = sum_v e^(c (u_v - m)) s_v weight_v        dlse / dX = A / (1 + r)
    dlogprob_y / dX = (1 - p_y) s_y weight_y - (A less the term of y) / (1 + r)

and A is multiplied by e^(c (m - m')) where a block has a larger maximum m': the online softmax of
Milakov and Gimelshein (arXiv 1805.02867, algorithm 3). That the term of y is left out keeps the
digits of a row whose target is nearly certain.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.backends.interface import Backend, RowSpec, Saved, Upstream, accumulate_dtype
from em_kernels.backends.specs import select_rows
from em_kernels.backends.units import inverse_temperature
from em_kernels.linear import products
from em_kernels.linear.chunking import column_blocks, width_of
from em_kernels.linear.plan import Linear, Rows
from em_kernels.linear.workspace import BlockMemory


class Block(NamedTuple):
    """Some columns of the logits of all rows, and what is known with them."""

    columns: slice
    spec: RowSpec  # bias and size are those of the block, targets count from the first block
    logits: Tensor  # (R, C)
    values: list[Tensor]  # [max, log1p_r, mean_d, *outputs], of all columns so far


class Pass(NamedTuple):
    """What goes through the blocks, a chunk of the counted rows at a time."""

    linear: Linear
    spec: RowSpec  # of all rows
    backend: Backend
    rows: Rows
    x: Tensor  # the hidden rows that are counted
    low: Tensor | None  # and those of the low-rank part

    @classmethod
    def over(cls, linear: Linear, spec: RowSpec, backend: Backend, rows: Rows) -> Pass:
        low = rows.low(linear, spec.mask)
        return cls(linear, spec, backend, rows, rows.operand(linear, spec.mask), low)

    def blocks(
        self, own: slice, outputs: tuple[str, ...], kept: Tensor | None = None
    ) -> Iterator[Block]:
        """The blocks of a chunk in turn, those `kept` has no room for all in the same memory."""
        linear, chunking, backend = self.linear, self.rows.chunking, self.backend
        count, x = own.stop - own.start, self.x[own]
        low = None if self.low is None else self.low[own]
        picked, parts = select_rows(self.spec, self.rows.at(own)), backend.new_parts(count)
        blocks = column_blocks(self.spec.valid_vocab, chunking.blocks, chunking.tile)
        widest, room = max(map(width_of, blocks)), None
        for columns in blocks:
            logits = self.rows.kept_logits(kept, own, columns)
            if logits is None:
                if room is None:
                    room = BlockMemory(backend, count, widest, linear.logits_dtype, x)
                logits = room.matrix(count, width_of(columns))
            linear.multiply(x, low, columns, logits, backend)
            bias = None if self.spec.bias is None else self.spec.bias[columns]
            spec = picked._replace(bias=bias, valid_vocab=width_of(columns))
            values = backend.part_stats(logits[None], spec, outputs, parts, columns.start)
            yield Block(columns, spec, logits, values)

    def stats(
        self, own: slice, outputs: tuple[str, ...], kept: Tensor | None = None
    ) -> list[Tensor]:
        """[max, log1p_r, mean_d, *outputs] of a chunk, whose first logits stay in `kept`, as far
        as that has room for them."""
        for block in self.blocks(own, outputs, kept):
            values = block.values
        return values

    def loss(self, own: slice, upstream: Upstream, outputs: tuple[str, ...]) -> list[Tensor]:
        """[*`stats`, dX] of a chunk where `upstream` has a single source; two products."""
        part, (source, weights) = self.rows.at(own), _source(upstream)
        kind = _LogprobSum if source == "logprob" else _LseSum
        row_spec = select_rows(self.spec, part)
        total = kind(self.linear, row_spec, self.backend, own.stop - own.start)
        asked = outputs if source in outputs else (*outputs, source)
        for block in self.blocks(own, asked):
            total.add(block)
        values, place = block.values, len(Saved._fields) + asked.index(source)
        grad = total.finish(values, values[place]) * weights[part][:, None]
        grad.masked_fill_(values[0].isnan()[:, None], torch.nan)
        return [*values[: len(Saved._fields) + len(outputs)], grad]


def has_single_source(upstream: Upstream) -> bool:
    """Whether logprob or lse alone bring the gradient of a loss, which `Pass.loss` can make."""
    given = [name for name, g in upstream._asdict().items() if g is not None]
    return given in (["logprob"], ["lse"])


def _source(upstream: Upstream) -> tuple[str, Tensor]:
    """(the single source, its weights)"""
    ((name, weights),) = ((n, g) for n, g in upstream._asdict().items() if g is not None)
    return name, weights


class _LseSum:
    """A of the columns so far, and dlse / dX of all."""

    def __init__(self, linear: Linear, spec: RowSpec, backend: Backend, count: int):
        self.linear, self.spec, self.backend = linear, spec, backend
        wide = accumulate_dtype(linear.hidden.dtype)
        self.total = linear.hidden.new_zeros(count, linear.hidden.shape[1], dtype=wide)
        self.c = inverse_temperature(spec, wide)
        self.max: Tensor | None = None

    def add(self, block: Block) -> None:
        if self.max is not None:
            # NaN, and nothing to scale, where no logit was finite before.
            d = (self.max - block.values[0]).mul_(self.c)
            self.total.mul_(d.exp_().nan_to_num_(0)[:, None])
        self.max = block.values[0]
        self.weigh(block)
        weight = self.linear.weight[block.columns]
        products.accumulate(self.total, block.logits.T, weight, True, self.backend)

    def weigh(self, block: Block) -> None:
        """e^d s in place of the logits: the gradient of lse if r were 0."""
        spec, max = block.spec._replace(target=None), block.values[0].nan_to_num(0)
        saved, one = Saved(max, torch.zeros_like(max), torch.zeros_like(max)), torch.ones_like(max)
        out = block.logits[None]
        self.backend.grad(out, spec, saved, Upstream(lse=one), out)

    def finish(self, values: list[Tensor], source: Tensor) -> Tensor:
        return self.total.mul_(values[1].neg().exp_()[:, None])


class _LogprobSum(_LseSum):
    """The same without the targets' terms, and dlogprob / dX."""

    def __init__(self, linear: Linear, spec: RowSpec, backend: Backend, count: int):
        super().__init__(linear, spec, backend, count)
        self.x_target = linear.hidden.new_zeros(count)

    def weigh(self, block: Block) -> None:
        target = self.spec.target - block.columns.start
        rows = ((target >= 0) & (target < block.logits.shape[1])).nonzero()[:, 0]
        columns = target[rows]
        self.x_target[rows] = block.logits[rows, columns]
        super().weigh(block)
        block.logits[rows, columns] = 0

    def finish(self, values: list[Tensor], source: Tensor) -> Tensor:
        others, own = super().finish(values, source), self.linear.weight[self.spec.target]
        others_mass = -torch.expm1(source) * self._slope()
        return torch.addcmul(others.neg_(), own.to(others.dtype), others_mass[:, None])

    def _slope(self) -> Tensor:
        """dz / dx at the targets: the gradient of rows of one entry, for which e^d is 1."""
        spec, x = self.spec, self.x_target * self.spec.logit_scale
        if spec.bias is not None:
            x = x + spec.bias[spec.target].to(x.dtype)
        most = torch.finfo(self.total.dtype).max ** 0.5  # of what is infinite
        x = x.to(self.total.dtype)[None, :, None].clamp(min=-most, max=most)
        one = spec._replace(bias=None, target=None, logit_scale=1.0, valid_vocab=1)
        saved = Saved(*self.backend.stats(x, one, ()))
        lse = torch.ones_like(saved.max)
        self.backend.grad(x, one, saved, Upstream(lse=lse), x)
        return x[0, :, 0] * spec.logit_scale
