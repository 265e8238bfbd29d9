"""AdamW with narrow weights or states: near torch's in float32, and what plain rounding loses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from em_kernels.trainer import adamw
from em_kernels.trainer.adamw import RoundingAdamW, make_adamw

STATES = [None, "float32", "bfloat16", "8bit"]


def weights(dtype=torch.float32, shape=(64, 100)) -> nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype))


def moved(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: int) -> torch.Tensor:
    """How far the steps of a noisy gradient have moved it."""
    before = parameter.detach().double()
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = (0.01 * noise + 0.01).to(parameter.dtype)
        optimizer.step()
    return parameter.detach().double() - before


def expected(steps: int = 30, lr: float = 1e-3) -> torch.Tensor:
    parameter = weights()
    return moved(torch.optim.AdamW([parameter], lr=lr, weight_decay=0.1), parameter, steps)


@pytest.mark.parametrize(
    "states, error", [("float32", 1e-6), (None, 1e-6), ("bfloat16", 0.01), ("8bit", 0.04)]
)
def test_float32_weights_move_as_torchs_do(states, error):
    parameter = weights()
    found = moved(RoundingAdamW([parameter], 1e-3, 0.1, states=states), parameter, 30)
    truth = expected()
    assert (found - truth).norm() < error * truth.norm()


@pytest.mark.parametrize("states", STATES)
def test_bfloat16_weights_move_as_far_as_float32_ones_do_on_average(states):
    """A step is a sixth of the distance between neighbours: torch's leaves most in place."""
    parameter, torchs = weights(torch.bfloat16), weights(torch.bfloat16)
    found = moved(RoundingAdamW([parameter], 2e-5, 0.1, states=states), parameter, 30)
    truth = expected(lr=2e-5)
    assert float(found.mean() / truth.mean()) == pytest.approx(1, abs=0.02)
    lost = moved(torch.optim.AdamW([torchs], lr=2e-5, weight_decay=0.1), torchs, 30)
    large = torchs.detach().abs() > 0.01
    assert abs(float(lost[large].mean() / truth[large].mean())) < 0.1
    assert float(found[large].mean() / truth[large].mean()) == pytest.approx(1, abs=0.05)


def test_the_second_moment_falls_as_it_should():
    """By a thousandth a step, which is less than bfloat16 and 8 bits can tell apart."""
    for states in ("bfloat16", "8bit"):
        parameter = weights()
        optimizer = RoundingAdamW([parameter], 0.0, 0.0, states=states)
        moved(optimizer, parameter, 1)
        before = second_moment(optimizer, parameter)
        for _ in range(100):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        ratio = second_moment(optimizer, parameter).sum() / before.sum()
        assert float(ratio) == pytest.approx(0.999**100, rel=0.02)


def second_moment(optimizer: RoundingAdamW, parameter: nn.Parameter) -> torch.Tensor:
    state = {n: x.view(-1) for n, x in optimizer.state[parameter].items() if n != "step"}
    return adamw._read("exp_avg_sq", state).double()


@pytest.mark.parametrize("states", STATES)
def test_the_same_seed_gives_the_same_bits_and_another_others(states):
    runs = []
    for seed in (0, 0, 1):
        parameter = weights(torch.bfloat16)
        moved(RoundingAdamW([parameter], 2e-5, 0.0, states=states, seed=seed), parameter, 3)
        runs.append(parameter.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("states", STATES)
def test_pieces_and_layout_change_no_more_than_the_random_numbers(states, monkeypatch):
    monkeypatch.setattr(adamw, "PIECE", 1024)
    transposed = nn.Parameter(weights().detach().t().contiguous().t())
    assert not transposed.is_contiguous()
    found = moved(RoundingAdamW([transposed], 1e-3, 0.1, states=states), transposed, 30)
    truth = expected()
    assert (found - truth).norm() < 0.04 * truth.norm()


def test_what_states_take():
    sizes = {}
    for states in STATES:
        parameter = weights(torch.bfloat16, (64, 256))
        optimizer = RoundingAdamW([parameter], 1e-3, 0.0, states=states)
        moved(optimizer, parameter, 1)
        sizes[states] = sum(x.nbytes for x in optimizer.state[parameter].values()) - 4
    n = 64 * 256
    assert sizes == {None: 4 * n, "float32": 8 * n, "bfloat16": 4 * n, "8bit": 2 * n + 8 * n // 256}


def test_small_parameters_are_not_kept_in_8_bits():
    parameter = weights(shape=(4095,))
    optimizer = RoundingAdamW([parameter], 1e-3, 0.0, states="8bit")
    moved(optimizer, parameter, 1)
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32


def test_torchs_own_is_used_where_nothing_is_narrow():
    assert type(make_adamw([weights()], 1e-3, 0.0, None, 0)) is torch.optim.AdamW
    assert type(make_adamw([weights()], 1e-3, 0.0, "float32", 0)) is torch.optim.AdamW
    assert type(make_adamw([weights()], 1e-3, 0.0, "bfloat16", 0)) is RoundingAdamW
    assert type(make_adamw([weights(torch.bfloat16)], 1e-3, 0.0, None, 0)) is RoundingAdamW
    assert type(make_adamw([weights(torch.float64)], 1e-3, 0.0, "float32", 0)) is torch.optim.AdamW
