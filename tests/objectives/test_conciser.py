"""ConciseR's two stages: GRPO++ with its sampling filter, and the length reward of L-GRPO."""

import math

import pytest
import torch
from objectives_inputs import poison, policy_inputs

from em_kernels.objectives import (
    dynamic_sampling_mask,
    group_advantage,
    grpo_loss,
    grpo_plus_plus_loss,
    l_grpo_reward,
)


def test_grpo_plus_plus_by_hand():
    old, ratio = torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.5, 0.9]])
    loss, metrics = grpo_plus_plus_loss(
        old + ratio.log(),
        old,
        torch.tensor([[2.0, 2.0]]),
        torch.ones(1, 2),
        torch.tensor([[0.5, 1.5]]),
        entropy_coef=0.1,
    )
    # 1.5 is clipped to 1.28; then minus 0.1 H.
    torch.testing.assert_close(loss, torch.tensor([[-2.56 - 0.05, -1.8 - 0.15]]))
    assert metrics["entropy"] == 1.0 and metrics["clip_fraction"] == 0.5


def test_grpo_plus_plus_gradcheck():
    logprob, old, advantage, mask = policy_inputs()
    entropy = torch.rand(mask.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, h: grpo_plus_plus_loss(x, old, advantage, mask, h, entropy_coef=0.2).loss,
        (logprob, entropy),
    )


def test_grpo_plus_plus_without_bonus_is_grpo_with_clip_higher():
    inputs = policy_inputs()
    entropy = torch.rand(inputs[3].shape, dtype=torch.float64)
    found = grpo_plus_plus_loss(*inputs, entropy, entropy_coef=0.0).loss
    assert torch.equal(found, grpo_loss(*inputs, clip_high=0.28).loss)


def test_grpo_plus_plus_masked_nan_does_no_harm():
    inputs = policy_inputs()
    mask = inputs[3]
    entropy = torch.rand(mask.shape, dtype=torch.float64, requires_grad=True)
    bad = [poison(x, mask) for x in (*inputs[:3], entropy)]
    loss, metrics = grpo_plus_plus_loss(*bad[:3], mask, bad[3])
    loss.sum().backward()
    assert all(x.grad.isfinite().all() for x in (bad[0], bad[3]))
    assert metrics["entropy"] == entropy[mask].mean()


def test_dynamic_sampling_keeps_mixed_groups():
    correct = torch.tensor([1, 1, 0, 0, 1, 0, 1, 0, 1])
    prompt = torch.tensor([5, 5, 2, 2, 9, 9, 9, 3, 4])  # all right, all wrong, mixed, two alone
    kept = [False] * 4 + [True] * 3 + [False] * 2
    assert dynamic_sampling_mask(correct, prompt).tolist() == kept
    assert dynamic_sampling_mask(correct.bool(), prompt).tolist() == kept
    assert dynamic_sampling_mask(correct[:0], prompt[:0]).shape == (0,)


def test_dynamic_sampling_drops_exactly_the_answers_without_advantage():
    correct = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0))
    prompt = torch.arange(60) % 20
    advantage = group_advantage(correct.float(), prompt)
    assert torch.equal(dynamic_sampling_mask(correct, prompt), advantage != 0)


def test_length_counts_only_where_all_are_right():
    correct = torch.tensor([1, 1, 1, 0, 1])
    length = torch.tensor([20, 60, 10, 10, 200])
    prompt = torch.tensor([0, 0, 1, 1, 2])
    reward = l_grpo_reward(correct, length, prompt, max_length=100)
    torch.testing.assert_close(reward, torch.tensor([1.8, 1.4, 1.0, 0.0, 1.0]))


def test_shorter_answers_get_the_gradient():
    correct, length = torch.ones(3), torch.tensor([10, 20, 30])
    prompt = torch.zeros(3, dtype=torch.int64)
    advantage = group_advantage(l_grpo_reward(correct, length, prompt, max_length=40), prompt)
    torch.testing.assert_close(advantage, torch.tensor([1.0, 0.0, -1.0]), rtol=1e-5, atol=1e-6)
    logprob = torch.full((3, 2), -1.0, requires_grad=True)
    grpo_loss(logprob, logprob.detach(), advantage, torch.ones(3, 2)).loss.sum().backward()
    torch.testing.assert_close(logprob.grad, -advantage.unsqueeze(-1).expand(3, 2))


def test_equal_lengths_give_no_advantage():
    length, prompt = torch.full((3,), 7), torch.zeros(3, dtype=torch.int64)
    reward = l_grpo_reward(torch.ones(3), length, prompt, max_length=9)
    assert group_advantage(reward, prompt).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, i: dynamic_sampling_mask([1], i), TypeError, "correct must be a tensor"),
        (lambda x, i: dynamic_sampling_mask(x, i[:1]), ValueError, "prompt must have shape"),
        (lambda x, i: l_grpo_reward(x, x, i, max_length=0), ValueError, "max_length must be"),
        (lambda x, i: l_grpo_reward(x, x[:1], i, max_length=9), ValueError, "length must have"),
        (lambda x, i: l_grpo_reward(x, 3, i, max_length=math.inf), TypeError, "length must be"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3), torch.zeros(3, dtype=torch.int64))
