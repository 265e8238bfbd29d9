"""The contract of a backend: the edge rules, excluded and undefined logits, rows left out."""

from __future__ import annotations

import pytest
import torch
from helpers import same_bits

from contract.closeness import check_rows, true_gradient, true_rows
from contract.subject import INF, NAN, Subject, pick
from em_kernels.backends.interface import RowSpec, Upstream

POISONS = ("nan", "+inf", "nan and +inf", "all -inf", "target", "temperature")


def edge_rows(subject: Subject, vocab: int, dtype: torch.dtype, softcap: float):
    """Rows of excluded, infinite and undefined logits, one kind each."""
    x, spec, upstream = subject.make(10, vocab, dtype, softcap=softcap)
    spec.target[:], spec.target[5] = 3, vocab - 1
    x[0, 0, ::2] = -INF  # half of the row excluded, the target (3) not
    x[0, 1, 3] = -INF  # the target excluded
    x[0, 2, 5] = NAN
    x[0, 3, 5] = INF
    x[0, 4] = -INF
    x[0, 5, : vocab // 2] = -INF  # whole blocks excluded
    x[0, 6] = NAN
    x[0, 7, :3], x[0, 7, 4:] = -INF, -INF  # one token left
    x[0, 8, 5], x[0, 8, 4] = INF, NAN
    return x, spec, upstream


def poison(x, spec, row: int, place: int, what: str) -> None:
    """Make a row one that cannot be computed."""
    vocab = x.shape[-1]
    match what:
        case "nan":
            x[0, row, place] = NAN
        case "+inf":
            x[0, row, place] = INF
        case "nan and +inf":
            x[0, row, place], x[0, row, place - 1] = NAN, INF
        case "all -inf":
            x[0, row] = -INF
        case "target":
            spec.target[row] = {0: -1, vocab - 1: vocab}.get(place, 2**40)
        case "temperature":
            spec.temperature_rows[row] = {0: 0.0, vocab - 1: NAN}.get(place, -1.0)


class Edges:
    # Logits of -inf

    @pytest.mark.parametrize("softcap", (0.0, 10.0))
    def test_excluded_undefined_and_infinite_logits(self, subject, dtype, softcap):
        for vocab in (40, self.LONG) if dtype == torch.float32 else (self.LONG,):
            x, spec, upstream = edge_rows(subject, vocab, dtype, softcap)
            subject.check(x, spec, upstream)
            rows = subject.stats(x, spec)
            bad = [False, False, True, True, True, False, True, False, True, False]
            assert all(row.isnan().tolist() == bad for row in rows.values())
            assert rows["logprob"][1] == -INF
            for name in ("entropy", "varentropy", "logit_var", "logit_skew", "entropy_slope"):
                assert rows[name][7] == 0, name
            for name in ("max_prob", "collision", "is_top1"):
                assert rows[name][7] == 1, name
            for out in (subject.grad(x, spec, upstream), subject.loss(x, spec, upstream)[1]):
                assert (out[0, [0, 5]][x[0, [0, 5]] == -INF] == 0).all()

    def test_a_target_on_a_minus_inf_logit(self, subject):
        """As in torch.log_softmax: the target's own logit has the gradient 1 - p = 1."""
        x, spec, upstream = subject.make(len(self.PLACES), self.LONG)
        rows = torch.arange(len(self.PLACES), device=subject.device)
        spec.target[:] = torch.tensor(self.PLACES)
        x[0, rows, spec.target] = -INF
        for given in (spec, spec._replace(temperature_rows=torch.ones_like(upstream.lse))):
            got, out = subject.loss(x, given, upstream)
            assert (got["logprob"] == -INF).all() and got["entropy"].isfinite().all()
            assert subject.stats(x, given)["entropy_slope"].isfinite().all()
            for gradient in (out, subject.grad(x, given, upstream)):
                assert gradient.isfinite().all()
                assert torch.equal(gradient[0, rows, spec.target], upstream.logprob)

    def test_one_finite_logit_is_certainty(self, subject, dtype):
        target = torch.tensor(self.PLACES, device=subject.device)
        rows = torch.arange(len(target), device=subject.device)
        x = torch.full((1, len(target), self.LONG), -INF, dtype=dtype, device=subject.device)
        x[0, rows, target] = torch.linspace(-7, 1e4, len(target), device=subject.device).to(dtype)
        spec = RowSpec(target=target, valid_vocab=self.LONG)
        got = subject.stats(x, spec)
        for name in ("entropy", "logprob", "varentropy", "logit_var", "logit_skew"):
            assert (got[name] == 0).all(), name
        for name in ("max_prob", "collision", "is_top1"):
            assert (got[name] == 1).all(), name
        assert (got["entropy_slope"] == 0).all()
        assert torch.equal(got["lse"], x[0, rows, target].to(got["lse"].dtype))
        upstream = subject.make(len(target), 2, dtype)[2]._replace(lse=None)
        for out in (subject.grad(x, spec, upstream), subject.loss(x, spec, upstream)[1]):
            assert (out == 0).all()

    def test_a_lone_nan_among_excluded_logits_is_seen(self, subject, place):
        x = torch.full((1, 1, self.LONG), -INF, device=subject.device)
        x[0, 0, self.LONG // 2 + 1] = 1.0
        x[0, 0, place] = NAN
        rows = subject.stats(x, RowSpec(valid_vocab=self.LONG))
        assert all(row.isnan().all() for row in rows.values())

    # Rows that cannot be computed

    @pytest.mark.parametrize("what", POISONS)
    def test_a_bad_row_is_nan_and_touches_no_other_row(self, subject, what, place, float_dtype):
        if not subject.on_gpu and what in ("target", "temperature"):
            pytest.skip("looked at before the call, where that waits for nothing")
        x, spec, upstream = subject.make(3, self.LONG, float_dtype, temperature_rows=torch.ones(3))
        clean = subject.run(x, spec, upstream)
        poison(x, spec, 1, place, what)
        good = torch.tensor([0, 2], device=subject.device)
        for a, b in zip(subject.run(x, spec, upstream), clean, strict=True):
            assert a[1].isnan().all() and same_bits(a[good], b[good])
        alone = Upstream(lse=upstream.lse)
        for out in (subject.grad(x, spec, alone), subject.loss(x, spec, alone)[1]):
            assert out[0, 1].isnan().all() and out[0, good].isfinite().all()

    # What is left out

    def test_left_out_rows_are_exact_zeros_and_not_read(self, subject, dtype):
        mask = torch.tensor([True, False, True, False], device=subject.device)
        temperature = torch.tensor([0.7, 1.0, 1.3, 1.0]).to(torch.float64)
        x, spec, upstream = subject.make(
            4,
            self.LONG,
            dtype,
            valid_vocab=self.LONG - 9,
            temperature_rows=temperature.to(subject.make(1, 2, dtype)[2].lse.dtype),
        )
        clean = subject.run(x, spec, upstream)
        x[0, 1], x[0, 3, 7], x[0, :, -9:] = NAN, INF, NAN
        spec.target[3], spec.target[1], spec.temperature_rows[3] = 10**9, -100, 0.0
        upstream = Upstream(*(torch.where(mask, g, NAN) for g in upstream))
        for a, b in zip(subject.run(x, spec._replace(mask=mask), upstream), clean, strict=True):
            assert (a[~mask] == 0).all() and same_bits(a[mask], b[mask])

    def test_all_rows_left_out(self, subject):
        x, spec, upstream = subject.make(3, self.LONG)
        mask = torch.zeros(3, dtype=torch.bool, device=subject.device)
        rows = subject.run(torch.full_like(x, NAN), spec._replace(mask=mask), upstream)
        assert all((row == 0).all() for row in rows)

    def test_padded_vocabulary_is_not_read_and_gets_no_gradient(self, subject):
        for valid in (1, 100, self.LONG // 2, self.LONG - 1):
            x, spec, upstream = subject.make(2, self.LONG, valid_vocab=valid)
            tight = subject.run(x[..., :valid], spec, upstream)
            x[..., valid:] = NAN
            *rows, grad, out = subject.run(x, spec, upstream)
            assert (grad[:, valid:] == 0).all() and (out[:, valid:] == 0).all()
            if subject.rowwise:
                for a, b in zip((*rows, grad[:, :valid], out[:, :valid]), tight, strict=True):
                    assert same_bits(a, b)
            check_rows(subject.stats(x, spec), true_rows(x, spec), x.dtype)
            subject.check_gradient(grad, true_gradient(x, spec, upstream)[0])

    @pytest.mark.parametrize("shape", ((0, 3, 50), (1, 0, 50)))
    def test_no_rows(self, subject, shape):
        x = torch.empty(shape, device=subject.device)
        _, spec, upstream = subject.make(1, 50)
        spec, upstream = pick(spec, slice(0, 0)), pick(upstream, slice(0, 0))
        rows, out = subject.loss(x, spec, upstream)
        assert all(row.shape == (0,) for row in (*rows.values(), *subject.stats(x, spec).values()))
        assert out.shape == subject.grad(x, spec, upstream).shape == shape
