"""Entropy control while generating."""

import math

import pytest
import torch
from helpers import IMPLS

from em_kernels import softmax_stats
from em_kernels.backends import entropy_control
from em_kernels.backends.interface import Descent, Goal
from em_kernels.backends.reference import Reference
from em_kernels.inference import AdaptiveTemperature, EntropyDescent
from em_kernels.tiny_math import PROMPT, model_path
from em_kernels.trainer import load_model

INF = float("inf")


def entropy(scores):
    return softmax_stats(scores.double(), outputs=("entropy",)).entropy


def draw(rows=5, vocab=301, spread=2.0, seed=0):
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def odd_rows(dtype, device, vocab=301):
    """Rows to change, one at the threshold already, masked logits, and three that are no
    distribution."""
    z = draw(8, vocab).to(dtype)
    z[1] *= 60
    z[2, 7:] = -INF
    z[3] = -INF
    z[4, 5] = float("nan")
    z[5, vocab - 1] = INF
    z[6] = 0
    return z.to(device)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])


def exact_temperature(z, threshold, ratio, minimum):
    """By halving until nothing is left to halve, in float64."""
    h = entropy(z)
    target = (ratio * h).clamp(min=threshold)
    low, high = torch.full_like(h, minimum), torch.ones_like(h)
    for _ in range(50):
        middle = (low + high) / 2
        too_low = entropy(z / middle[:, None]) < target
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.where(h > threshold, low, 1.0)


@DTYPES
@pytest.mark.parametrize("impl", IMPLS)
def test_the_temperature_is_the_solution_to_the_last_halving(impl, device, dtype):
    z = odd_rows(dtype, device)
    settings = dict(ratio=0.4, minimum=0.1)
    processor = AdaptiveTemperature(0.5, iterations=6, impl=impl, **settings)
    found, want = processor.temperature(z), exact_temperature(z, 0.5, **settings)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (found - want).abs().max() <= 0.9 / 2**6 + 1e-5
    assert (found[[1, 3, 4, 5]] == 1).all() and (found[[0, 2, 6, 7]] < 1).all()


def exact_descent(z, threshold, steps, learning_rate):
    """(z, how many steps each row took) by autograd of the definition, in float64."""
    z, taken = z.double(), 0
    for _ in range(steps):
        x = z.detach().requires_grad_()
        h = softmax_stats(x, outputs=("entropy",), impl="reference").entropy
        (gradient,) = torch.autograd.grad(h.sum(), x)
        z = torch.where((h > threshold)[:, None], z - learning_rate * gradient, z)
        taken += (h > threshold).int()
    return z.detach(), taken.tolist()


@DTYPES
@pytest.mark.parametrize("impl", IMPLS)
def test_every_row_descends_until_it_is_low_enough(impl, device, dtype):
    z, settings = odd_rows(dtype, device), dict(threshold=0.8, steps=6, learning_rate=1.0)
    got, (want, taken) = (
        EntropyDescent(impl=impl, **settings)(None, z),
        exact_descent(z, **settings),
    )
    assert taken == [3, 0, 3, 0, 0, 0, 6, 4]
    torch.testing.assert_close(got, want.to(dtype), equal_nan=True)
    left_alone = [1, 3, 4, 5]
    torch.testing.assert_close(got[left_alone], z[left_alone], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (2, 1)])
@pytest.mark.parametrize("impl", IMPLS)
def test_any_leading_shape(impl, device, shape):
    z = torch.randn(*shape, 9, device=device)
    assert AdaptiveTemperature(0.1, impl=impl).temperature(z).shape == shape
    assert (
        EntropyDescent(0.1, impl=impl)(None, z.transpose(0, -1).transpose(0, -1)).shape == z.shape
    )


class Recorded(Reference):
    def __init__(self, rows):
        self.stats = self.loss = rows


def calls_of(processor, z) -> list[str]:
    """The names of the functions of a backend that are called, on tensors without values: where
    anything waits for a value, it is an error."""
    called = []

    def rows(logits, *_):
        called.append("rows")
        return [logits.new_empty(logits.shape[:-1].numel()) for _ in range(4)]

    processor(Recorded(rows), z.to("meta")[None])
    return called


def test_nothing_waits_for_a_device():
    goal = Goal(0.3, 0.0, 0.05, 12)
    descent = Descent(0.3, 1.0, 10)
    calls = calls_of(lambda *a: entropy_control.find_temperature(*a, goal), draw())
    assert len(calls) == 13
    assert len(calls_of(lambda *a: entropy_control.descend(*a, descent), draw())) == 10


@pytest.mark.parametrize("processor", [EntropyDescent, AdaptiveTemperature])
def test_the_triton_kernels_are_launched_once(monkeypatch, processor):
    pytest.importorskip("triton", reason="the Triton backend needs triton")
    from triton.runtime.jit import KernelInterface

    grids, launch = [], KernelInterface.__getitem__

    def count(kernel, grid):
        grids.append(grid)
        return launch(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", count)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor(0.2, impl="triton")(None, draw(3).to(device))
    assert grids == [(3,)]


def test_the_loops_are_one_call_in_a_compiled_graph():
    z = draw(3)
    for processor in (EntropyDescent(0.2, steps=3), AdaptiveTemperature(0.2)):
        compiled = torch.compile(processor.__call__, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(None, z), processor(None, z), rtol=0, atol=0)


def test_one_step_of_descent_is_the_gradient_of_the_entropy():
    z = draw().double()
    p = z.softmax(-1)
    logp = z.log_softmax(-1)
    h = -(p * logp).sum(-1, keepdim=True)
    expected = z + 0.7 * p * (logp + h)
    got = EntropyDescent(0.0, steps=1, learning_rate=0.7)(None, z)
    torch.testing.assert_close(got, expected)


def test_descent_stops_at_the_threshold_and_keeps_the_order():
    z = torch.cat([draw(4), draw(1, spread=60.0)])
    got = EntropyDescent(1.0, steps=400, learning_rate=2.0)(None, z)
    before, after = entropy(z), entropy(got)
    assert before[4] < 1 and torch.equal(got[4], z[4])
    assert (before[:4] > 2).all() and (after[:4] <= 1.0).all()
    assert torch.equal(got.argsort(-1), z.argsort(-1))


@pytest.mark.parametrize("processor", [EntropyDescent(0.2, steps=5), AdaptiveTemperature(0.2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_independent_and_masked_logits_stay_masked(processor, dtype):
    z = draw(6).to(dtype)
    z[1, 7:] = -INF
    z[2, 5] = float("nan")
    z[3] = -INF
    z[4, 3] = INF
    kept = z.clone()
    got = processor(None, z)
    assert torch.equal(z.nan_to_num(9.0), kept.nan_to_num(9.0)), "the scores passed in were changed"
    assert got.dtype == dtype and got.shape == z.shape
    assert torch.equal(got[1, 7:], z[1, 7:]) and got[[0, 1, 5]].isnan().sum() == 0
    for row in (2, 3, 4):
        torch.testing.assert_close(got[row], z[row], equal_nan=True, rtol=0, atol=0)
    for row in range(6):
        alone = processor(None, z[row : row + 1])[0]
        torch.testing.assert_close(got[row], alone, equal_nan=True, rtol=0, atol=0)


def test_adaptive_temperature_reaches_the_entropy_aimed_at():
    z = draw(5)
    z[4] *= 60
    processor = AdaptiveTemperature(0.5, ratio=0.3, iterations=20)
    h = entropy(z)
    target = (0.3 * h).clamp(min=0.5)
    got = processor(None, z)
    torch.testing.assert_close(entropy(got)[:4], target[:4], rtol=1e-3, atol=0)
    assert h[4] < 0.5 and torch.equal(got[4], z[4])


def test_adaptive_temperature_of_ties_is_the_minimum():
    z = torch.tensor([[1.0, 1.0, 0.0]])
    temperature = AdaptiveTemperature(0.1, minimum=0.25).temperature(z)
    assert math.isclose(temperature.item(), 0.25)


def test_generation_with_a_processor_has_less_entropy():
    from transformers import LogitsProcessorList

    model, tokenizer = load_model(str(model_path()), "cpu")
    text = [{"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(
        text, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    settings = dict(do_sample=True, max_new_tokens=20, output_logits=True, output_scores=True)
    settings.update(return_dict_in_generate=True, num_return_sequences=8)
    for processor in (
        EntropyDescent(0.05, steps=50, learning_rate=4.0),
        AdaptiveTemperature(0.05, minimum=1e-3),
    ):
        torch.manual_seed(0)
        chosen = LogitsProcessorList([processor])
        out = model.generate(**ids, **settings, logits_processor=chosen, top_k=0)
        raw = entropy(torch.stack(out.logits, 1))
        controlled = entropy(torch.stack(out.scores, 1))
        assert (raw > 0.05).any(), "nothing to control"
        assert (controlled <= raw + 1e-6).all()
        assert controlled.mean() < 0.8 * raw.mean()
    assert controlled.max() < 0.06


def test_inference_mode_is_served():
    with torch.inference_mode():
        assert EntropyDescent(0.1)(None, draw()).isfinite().all()
        assert AdaptiveTemperature(0.1)(None, draw()).isfinite().all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: EntropyDescent(-1.0), "threshold must be 0 or more"),
        (lambda: EntropyDescent(steps=0), "steps must be a positive int"),
        (lambda: EntropyDescent(learning_rate=0.0), "learning_rate must be positive"),
        (lambda: AdaptiveTemperature(ratio=1.0), "ratio must be in"),
        (lambda: AdaptiveTemperature(minimum=0.0), "minimum must be in"),
        (lambda: AdaptiveTemperature(iterations=True), "iterations must be a positive int"),
    ],
)
def test_bad_settings(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_scores_must_be_floating():
    with pytest.raises(TypeError, match="scores must be float32"):
        EntropyDescent()(None, torch.zeros(2, 3, dtype=torch.int64))
