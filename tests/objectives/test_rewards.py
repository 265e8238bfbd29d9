"""Every reward by hand, and the gradient a reward makes."""

import math
import subprocess
import sys

import pytest
import torch

from em_kernels import softmax_stats
from em_kernels.objectives import (
    format_reward,
    group_advantage,
    grpo_loss,
    length_reward,
    majority_reward,
    negative_entropy_reward,
    random_reward,
    self_certainty_reward,
    verified_reward,
)
from em_kernels.objectives.empo import NO_ANSWER


def test_verified():
    responses = [r"\boxed{0.5}", "it is 7", "nothing"]
    assert verified_reward(responses, ["1/2", "8", "8"]).tolist() == [1.0, 0.0, 0.0]
    reward = verified_reward(
        responses, ["", "", ""], judge=lambda response, answer: "is" in response
    )
    assert reward.tolist() == [0.0, 1.0, 0.0]
    assert verified_reward([], []).shape == (0,)


def test_majority():
    cluster = torch.tensor([0, 1, 1, 0, 1, 5, 5])
    prompt = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    assert majority_reward(cluster, prompt).tolist() == [0, 1, 1, 0, 1, 1, 1]


def test_majority_tie_goes_to_the_first_and_no_answer_never_wins():
    cluster = torch.tensor([1, 0, 0, 1, NO_ANSWER, NO_ANSWER, NO_ANSWER])
    assert majority_reward(cluster, torch.zeros(7).long()).tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert majority_reward(cluster[4:], torch.zeros(3).long()).tolist() == [0, 0, 0]
    assert majority_reward(cluster[:1], torch.zeros(1).long()).tolist() == [1]
    assert majority_reward(cluster[:0], torch.zeros(0).long()).shape == (0,)


@pytest.mark.parametrize(
    ("reward", "sign"), [(negative_entropy_reward, -1.0), (self_certainty_reward, 1.0)]
)
def test_means_over_an_answer(reward, sign):
    values = torch.tensor([[1.0, 2.0, math.nan], [4.0, math.inf, math.nan], [math.nan] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    values.requires_grad_()
    found = reward(values, mask)
    assert found.tolist() == [sign * 1.5, sign * 4.0, 0.0] and not found.requires_grad


def test_certain_answers_earn_more():
    logits = torch.stack([torch.zeros(4, 9), 5 * torch.eye(4, 9)])
    stats = softmax_stats(logits, outputs=("entropy", "self_certainty"))
    mask = torch.ones(2, 4)
    entropy = negative_entropy_reward(stats.entropy, mask)
    certainty = self_certainty_reward(stats.self_certainty, mask)
    torch.testing.assert_close(entropy[0].item(), -math.log(9), rtol=1e-6, atol=0)
    assert certainty[0].item() == pytest.approx(0.0, abs=1e-6)
    assert entropy[1] > entropy[0] and certainty[1] > certainty[0]


def test_length():
    reward = length_reward(torch.tensor([0, 25, 100, 400]), max_length=100)
    assert reward.tolist() == [1.0, 0.75, 0.0, 0.0]


def test_random_is_seeded_and_of_the_given_rate():
    like = torch.zeros(4000)
    draws = [
        random_reward(like, probability=0.3, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert set(draws[0].unique().tolist()) == {0.0, 1.0}
    assert abs(draws[0].mean() - 0.3) < 0.03  # 4 standard deviations
    assert random_reward(like, probability=0.0).sum() == 0
    assert random_reward(like, probability=1.0).sum() == 4000


def test_format_counts_a_marked_answer_right_or_wrong():
    responses = [r"\boxed{wrong}", r"\boxed{}", "the answer is 3", "#### 3", r"\boxed{1", "####"]
    assert format_reward(responses).tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_gradient_favours_the_rewarded_answer():
    reward = verified_reward([r"\boxed{1}", r"\boxed{2}"], ["1", "1"])
    advantage = group_advantage(reward, torch.tensor([0, 0]), normalize_std=False)
    logprob = torch.full((2, 3), -1.0, requires_grad=True)
    grpo_loss(logprob, logprob.detach(), advantage, torch.ones(2, 3)).loss.sum().backward()
    assert logprob.grad.tolist() == [[-0.5] * 3, [0.5] * 3]


def test_objectives_load_without_trainer_and_evaluator():
    code = (
        "import sys, em_kernels.objectives; "
        "print([m for m in sys.modules if m.startswith(('em_kernels.t', 'em_kernels.e'))])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "trainer" not in loaded.stdout and "evaluator" not in loaded.stdout


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: verified_reward(["a"], []), ValueError, "answers must have 1 entries.*got 0"),
        (lambda x: majority_reward([1], x), TypeError, "cluster must be a tensor, got list"),
        (lambda x: majority_reward(x, x.float()), ValueError, "prompt must be .* integer ids"),
        (lambda x: negative_entropy_reward(x, x), TypeError, "entropy must be floating point"),
        (lambda x: self_certainty_reward(x / 2, x[:1]), ValueError, "mask must have shape"),
        (lambda x: length_reward(x, max_length=0), ValueError, "max_length must be positive"),
        (lambda x: random_reward(x, probability=2), ValueError, r"probability must be in \[0, 1\]"),
        (lambda x: random_reward(3), TypeError, "like must be a tensor, got int"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.arange(3))
