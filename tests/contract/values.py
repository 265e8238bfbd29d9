"""The contract of a backend: values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_logits, same_bits

from contract.closeness import (
    LIMIT,
    NEARLY_CERTAIN,
    ROUNDED,
    check_gradient,
    check_row,
    check_rows,
    true_gradient,
    true_rows,
)
from contract.subject import FIRST_ORDER, INF, LOSS
from em_kernels.backends.interface import RowSpec, Upstream, accumulate_dtype


def certain_rows(vocab: int):
    """Rows whose best logit leads by 0 to 31 nats: entropies from log V to below 1e-9."""
    x = torch.randn(1, 9, vocab)
    x[0, :, vocab // 3] = x[0].amax(-1) + torch.tensor([0.0, 1, 4, 7, 10, 13, 16, 22, 31])
    return x


class Values:
    def test_every_length(self, subject, dtype, vocab):
        subject.check(*subject.make(2, vocab, dtype))

    @pytest.mark.parametrize(
        "options",
        (
            {"temperature": 0.7, "logit_scale": -1.3},
            {"temperature": 2.5, "logit_scale": 0.4},
            {"logit_scale": 0.0},
            {"softcap": 4.0},
            {"softcap": 30.0, "temperature": 2.0, "logit_scale": 0.5},
            {"bias": True, "temperature": 1.7},
            {"bias": True, "softcap": 12.0, "temperature": 0.8, "logit_scale": 1.5},
            {"temperature_rows": True},
        ),
        ids=lambda options: "-".join(options),
    )
    def test_transforms(self, subject, dtype, options):
        wide = accumulate_dtype(dtype)
        drawn = {"bias": torch.randn(self.LONG).to(dtype), "temperature_rows": torch.rand(2) + 0.3}
        drawn["temperature_rows"] = drawn["temperature_rows"].to(wide)
        options = {name: drawn.get(name, value) for name, value in options.items()}
        subject.check(*subject.make(2, self.LONG, dtype, **options))

    def test_everything_at_once(self, subject, dtype):
        """Rows of a padded vocabulary in a larger tensor, some left out, with all that there is."""
        vocab, wide = self.LONG, accumulate_dtype(dtype)
        whole = random_logits(3, 4, vocab + 20, dtype=dtype).to(subject.device)
        x, rows = whole[:, :-1, 8 : vocab + 8], 9
        _, spec, upstream = subject.make(
            rows,
            vocab,
            dtype,
            bias=torch.randn(vocab).to(wide),
            mask=torch.arange(rows) % 3 != 1,
            temperature_rows=(torch.rand(rows) + 0.5).to(wide),
            softcap=20.0,
            logit_scale=0.6,
            valid_vocab=max(1, vocab - 5),
        )
        before = whole.clone()
        subject.check(x, spec, upstream)
        subject.check(x, spec._replace(bias=None, softcap=0.0), upstream)
        assert same_bits(whole, before)

    @pytest.mark.parametrize("given", ((0,), (1,), (2,), ()), ids=str)
    def test_gradient_of_one_output(self, subject, dtype, given):
        for vocab in (self.LENGTHS[1], self.LONG):
            x, spec, upstream = subject.make(2, vocab, dtype)
            upstream = Upstream(*(g if i in given else None for i, g in enumerate(upstream)))
            if 0 not in given:
                spec = spec._replace(target=None)
            want = true_gradient(x, spec, upstream)
            subject.check_gradient(subject.grad(x, spec, upstream), want)
            subject.check_gradient(subject.loss(x, spec, upstream, ("entropy",))[1], want)

    @pytest.mark.parametrize(
        ("temperature", "shift"), ((1.0, 0.0), (1.0, 20.0), (0.3, 20.0), (0.7, 0.0), (1.9, 20.0))
    )
    def test_nearly_certain_rows_keep_relative_accuracy(self, subject, temperature, shift):
        """d is 0 at the maximum, and what lies near it is exact wherever the logits lie."""
        x = temperature * certain_rows(self.LONG) + shift
        spec = RowSpec(target=x[0].argmax(-1), valid_vocab=self.LONG, temperature=temperature)
        x, spec = x.to(subject.device), subject.place(spec)
        want = true_rows(x, spec)
        assert want["entropy"].min() < 1e-9 and want["entropy"].max() > 0.8 * math.log(self.LONG)
        limit = NEARLY_CERTAIN
        small = ("entropy", "logprob", "log1p_r", "mean_d", "varentropy")
        for rows in (subject.stats(x, spec), subject.stats(x, spec, FIRST_ORDER)):
            for name in [name for name in small if name in rows]:
                check_row(rows[name], want[name], limit, name=name)
        ones = torch.ones(x.shape[1], device=subject.device)
        for upstream in (Upstream(entropy=ones), Upstream(logprob=ones)):
            want = true_gradient(x, spec, upstream)
            for out in (subject.grad(x, spec, upstream), subject.loss(x, spec, upstream)[1]):
                check_gradient(out, want, limit)

    def test_entropy_slope_of_the_likeliest_token(self, subject):
        """Down to where the definition in float64 has digits left."""
        x = certain_rows(self.LONG)[:, :-2].to(subject.device)
        spec = RowSpec(target=x[0].argmax(-1), valid_vocab=self.LONG)
        name = "entropy_slope"
        check_row(subject.stats(x, spec, (name,))[name], true_rows(x, spec)[name], NEARLY_CERTAIN)

    def test_the_maximum_is_left_out_wherever_it_lies(self, subject, dtype):
        """What is left is its own size, not the rounding of 1 + it; a second maximum counts."""
        places = self.PLACES
        x = torch.full((1, 2 * len(places), self.LONG), -28.0, dtype=dtype, device=subject.device)
        for i, place in enumerate(places):
            x[0, 2 * i : 2 * i + 2, place] = 0.0
            x[0, 2 * i + 1, places[i - 1]] = 0.0
        spec = RowSpec(valid_vocab=self.LONG)
        upstream = Upstream(entropy=torch.ones(x.shape[1], device=subject.device))
        rows, out = subject.loss(x, spec, upstream, ())
        check_rows(rows, true_rows(x, spec), dtype)
        assert rows["max"].eq(0).all() and 0 < rows["log1p_r"].min() < 1e-6
        subject.check_gradient(out, true_gradient(x, spec, upstream))

    def test_logit_gradients_sum_to_zero(self, subject):
        x, spec, upstream = subject.make(4, self.LONG)
        for name in ("logprob", "entropy"):
            alone = Upstream(**{name: getattr(upstream, name)})
            for out in (subject.grad(x, spec, alone), subject.loss(x, spec, alone)[1]):
                wide = out.double()
                assert (wide.sum(-1).abs() <= 1e-6 * wide.abs().sum(-1)).all()

    def test_a_uniform_row_has_the_entropy_log_v(self, subject, dtype, vocab):
        x = torch.full((1, 2, vocab), -7.25, dtype=dtype, device=subject.device)
        spec = RowSpec(valid_vocab=vocab)
        rows = subject.stats(x, spec)
        log_v, each = torch.full((2,), math.log(vocab)), torch.full((2,), 1 / vocab)
        check_row(rows["entropy"], log_v, ROUNDED, 1)
        check_row(rows["collision"], each, ROUNDED)
        check_row(rows["max_prob"], each, ROUNDED)
        assert rows["logit_var"].eq(0).all() and rows["logit_mean"].eq(-7.25).all()
        ones = torch.ones(2, device=subject.device, dtype=accumulate_dtype(dtype))
        some, out = subject.loss(x, spec, Upstream(entropy=ones), ("entropy",))
        check_row(some["entropy"], log_v, ROUNDED, 1)
        assert out.abs().max() < 1e-6

    def test_ties_count_and_the_first_is_the_argmax(self, subject):
        x, target = torch.full((1, len(self.PLACES), self.LONG), -20.0), torch.tensor(self.PLACES)
        x[0, :, target] = 5.0
        spec = subject.place(RowSpec(target=target, valid_vocab=self.LONG))
        x = x.to(subject.device)
        top = subject.stats(x, spec, ("is_top1",))["is_top1"]
        assert top.tolist() == (target == target.min()).tolist()
        subject.check(x, spec, subject.make(len(target), 2)[2])

    def test_logit_moments_of_blocks_at_different_levels(self, subject):
        """Where a shift taken from the first entries is a poor one."""
        x = torch.randn(1, 2, self.LONG)
        x[..., : self.LONG // 5] += 50
        x[..., self.LONG // 2 :] -= 1000
        x = x.to(subject.device)
        outputs = ("logit_mean", "logit_var", "logit_skew", "self_certainty")
        spec = RowSpec(valid_vocab=self.LONG)
        check_rows(subject.stats(x, spec, outputs), true_rows(x, spec), x.dtype)

    def test_all_logits_negative(self, subject):
        x, spec, upstream = subject.make(2, self.LONG)
        subject.check(-3 - x.abs(), spec, upstream)

    @pytest.mark.parametrize("shift", (1e4, -1e4))
    def test_exact_under_a_shift(self, subject, shift):
        x, spec, upstream = subject.make(3, self.LONG)
        x = (x * 64).round() / 64  # x + shift is exact
        shifted = x + shift
        assert torch.equal(shifted - shift, x)
        want, got = subject.stats(x, spec), subject.stats(shifted, spec)
        for name in ("entropy", "logprob", "varentropy", "collision", "max_prob", "entropy_slope"):
            assert same_bits(got[name], want[name]), name
        check_row(got["lse"], want["lse"].double() + shift, LIMIT[torch.float32])
        check_row(got["logit_var"], want["logit_var"], 1e-3)
        rows, out = subject.loss(x, spec, upstream)
        other, other_out = subject.loss(shifted, spec, upstream)
        assert all(same_bits(other[name], rows[name]) for name in rows if name != "max")
        assert same_bits(other_out, out)
        assert same_bits(subject.grad(shifted, spec, upstream), subject.grad(x, spec, upstream))

    def test_logits_of_extreme_size(self, subject):
        """Differences overflow float32; what is left is a certain row, not NaN."""
        lowest = torch.finfo(torch.float32).min
        x = torch.full((1, 5, self.LONG), -INF)
        x[0, :3, :3] = torch.tensor([[3e38, -3e38, 0], [-3e38, -3e38, -3e38], [1e30, 1e30, -1e30]])
        x[0, 3:] = lowest
        x[0, 4, self.LONG // 2] = 3.0
        spec = RowSpec(target=torch.zeros(5, dtype=torch.int64), valid_vocab=self.LONG)
        x, spec = x.to(subject.device), subject.place(spec)
        ones = Upstream(entropy=torch.ones(5, device=subject.device))
        want = torch.tensor([0.0, math.log(3), math.log(2), math.log(self.LONG), 0.0])
        rows, out = subject.loss(x, spec, ones)
        for got in (rows, subject.stats(x, spec, (*LOSS, "varentropy"))):
            check_row(got["entropy"], want, ROUNDED, 1)
            check_row(got["logprob"][:4], -want[:4], ROUNDED, 1)
        check_row(got["varentropy"], torch.zeros(5), 1e-6, 1)
        assert out.isfinite().all() and subject.grad(x, spec, ones).isfinite().all()
