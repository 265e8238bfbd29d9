"""The contract of a backend: where it reads and writes, and what its bits depend on."""

from __future__ import annotations

import pytest
import torch
from helpers import random_logits, same_bits

from contract.closeness import true_gradient
from contract.subject import FIRST_ORDER, NAN, misaligned, pick, untouched
from em_kernels.backends.interface import ROW_OUTPUTS


class Memory:
    @pytest.mark.parametrize("cut", ("tail", "head", "every other token", "vocabulary"))
    def test_strided_views_are_read_and_written_in_place(self, subject, float_dtype, cut):
        whole = random_logits(2, 3, self.LONG + 11, dtype=float_dtype).to(subject.device)

        def view(x):
            return {
                "tail": x[:, :-1],
                "head": x[:, 1:],
                "every other token": x[:, ::2],
                "vocabulary": x[..., 7 : self.LONG + 2],
            }[cut]

        x = view(whole)
        _, spec, upstream = subject.make(x.shape[0] * x.shape[1], x.shape[2], float_dtype)
        subject.check(x, spec, upstream)
        for call in (subject.loss, subject.grad):
            given = whole.clone()
            call(view(given), spec, upstream, out=view(given))
            subject.check_gradient(view(given), true_gradient(x, spec, upstream))
            if subject.rowwise:
                dense = torch.empty_like(x.contiguous())
                call(x.contiguous(), spec, upstream, out=dense)
                assert same_bits(view(given).contiguous(), dense)
            outside = torch.ones_like(whole, dtype=torch.bool)
            view(outside).fill_(False)
            assert same_bits(given[outside], whole[outside])

    @pytest.mark.parametrize("by", (1, 3, 7))
    def test_bits_do_not_depend_on_where_a_row_begins(self, subject, dtype, by):
        if not subject.rowwise:
            pytest.skip("not promised")
        for vocab in (self.LENGTHS[2], self.LONG):
            x, spec, upstream = subject.make(2, vocab, dtype)
            rows, out = subject.loss(misaligned(x, 0), spec, upstream, FIRST_ORDER)
            grad = subject.grad(x, spec, upstream)
            every = subject.stats(misaligned(x, 0), spec)
            given = misaligned(x, by)
            assert all(same_bits(a, every[name]) for name, a in subject.stats(given, spec).items())
            for out_by in ((by * 5) % 8, by):
                to = misaligned(torch.full_like(x, NAN), out_by)
                other, _ = subject.loss(given, spec, upstream, FIRST_ORDER, to)
                assert all(same_bits(other[name], row) for name, row in rows.items())
                assert same_bits(to.contiguous(), out) and untouched(to)
                subject.grad(given, spec, upstream, to)
                assert same_bits(to.contiguous(), grad) and untouched(to)
            subject.loss(given, spec, upstream, (), given)
            assert same_bits(given.contiguous(), out) and untouched(given)

    def test_out_may_be_the_logits(self, subject, dtype):
        for vocab in (self.LENGTHS[-1], self.LONG):
            x, spec, upstream = subject.make(3, vocab, dtype)
            grad, given = subject.grad(x, spec, upstream), x.clone()
            subject.grad(given, spec, upstream, given)
            assert same_bits(given, grad)

    def test_bits_depend_neither_on_the_time_nor_on_other_rows(self, subject, dtype):
        x, spec, upstream = subject.make(5, self.LONG, dtype)
        every = subject.run(x, spec, upstream)
        assert all(map(same_bits, subject.run(x.clone(), spec, upstream), every))
        if subject.rowwise:
            for rows in (slice(3, 4), slice(1, 4)):
                some = subject.run(x[:, rows].contiguous(), pick(spec, rows), pick(upstream, rows))
                assert all(same_bits(a, b[rows]) for a, b in zip(some, every, strict=True))

    @pytest.mark.parametrize("temperature", (1.0, 0.7))
    def test_bits_of_an_output_do_not_depend_on_what_else_is_asked_for(
        self, subject, dtype, temperature
    ):
        x, spec, _ = subject.make(2, self.LONG, dtype, temperature=temperature)
        together = subject.stats(x, spec)
        for name in ROW_OUTPUTS:
            alone = subject.stats(x, spec, (name,))
            assert all(same_bits(row, together[key]) for key, row in alone.items()), name
