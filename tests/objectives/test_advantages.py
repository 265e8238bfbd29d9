"""Group advantages by hand, and in the groups that have none."""

import math
import warnings

import pytest
import torch

from em_kernels.objectives import group_advantage


def test_by_hand():
    reward = torch.tensor([1.0, 10.0, 0.0, 30.0, 2.0])
    prompt = torch.tensor([0, 7, 0, 7, 0])
    # Group 0: 1, 0, 2 with mean 1 and std 1; group 7: 10, 30 with mean 20 and std sqrt(200).
    root = 10 / math.sqrt(200)
    expected = torch.tensor([0.0, -root, -1.0, root, 1.0])
    torch.testing.assert_close(group_advantage(reward, prompt, eps=0.0), expected)
    centred = group_advantage(reward, prompt, normalize_std=False)
    assert centred.tolist() == [0.0, -10.0, -1.0, 10.0, 1.0]


def test_population_std_and_eps():
    reward, prompt = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])
    advantage = group_advantage(reward, prompt, correction=0, eps=0.5)
    assert advantage.tolist() == [-0.5, 0.5]  # +-0.5 / (0.5 + 0.5)


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_equal_rewards_and_groups_of_one_are_exactly_zero(normalize_std, eps):
    reward = torch.tensor([0.1, 0.1, 0.1, 5.0], dtype=torch.float64)
    prompt = torch.tensor([3, 3, 3, 4])
    options = dict(normalize_std=normalize_std, eps=eps)
    assert group_advantage(reward, prompt, **options).tolist() == [0.0] * 4
    assert group_advantage(reward[:0], prompt[:0], **options).shape == (0,)
    with pytest.warns(UserWarning, match="every prompt has one answer"):
        assert group_advantage(reward[3:], prompt[3:], correction=0, **options).tolist() == [0.0]


def test_groups_of_one_alone_are_warned_of(recwarn):
    reward = torch.tensor([1.0, 0.0, 1.0])
    group_advantage(reward, torch.tensor([0, 0, 1]))  # one group can be learned from
    group_advantage(reward[:0], torch.tensor([], dtype=torch.int64))
    assert not recwarn
    with pytest.warns(UserWarning, match="give all the answers to a prompt the same id"):
        assert group_advantage(reward, torch.tensor([4, 2, 9])).tolist() == [0.0] * 3


def test_it_is_compiled_in_one_graph():
    rewards = torch.tensor([1.0, 2.0, 5.0])
    compiled = torch.compile(group_advantage, backend="eager", fullgraph=True)
    for prompt in (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = group_advantage(rewards, prompt)
        assert torch.equal(compiled(rewards, prompt), expected)


def test_nan_stays_in_its_group_and_the_result_is_detached():
    reward = torch.tensor([math.nan, 1.0, 0.0, 1.0], requires_grad=True)
    advantage = group_advantage(reward, torch.tensor([0, 0, 1, 1]))
    assert advantage.isnan().tolist() == [True, True, False, False]
    assert not advantage.requires_grad and advantage.dtype == torch.float32


def test_policy_gradient_with_it_is_the_gradient_of_the_normalised_reward():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    token, prompt = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 1])
    reward = torch.tensor([1.0, 0.0, 3.0, 7.0], dtype=torch.float64)
    advantage = group_advantage(reward, prompt, eps=0.0)
    (advantage * logits.log_softmax(-1)[range(4), token]).sum().backward()
    half = math.sqrt(0.5)  # two rewards differ from their mean by std / sqrt(2)
    sign = torch.tensor([half, -half, -half, half], dtype=torch.float64).unsqueeze(-1)
    one_hot = torch.nn.functional.one_hot(token, 6)
    torch.testing.assert_close(logits.grad, sign * (one_hot - logits.detach().softmax(-1)))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], torch.zeros(1).long()), {}, TypeError, "reward must be a tensor, got list"),
        ((torch.ones(2).long(), torch.zeros(2).long()), {}, TypeError, "reward must be floating"),
        ((torch.ones(2), torch.zeros(3).long()), {}, ValueError, r"prompt must have shape \(2,\)"),
        ((torch.ones(2), torch.zeros(2)), {}, ValueError, r"prompt must be \(N,\) integer ids"),
        ((torch.ones(2), torch.zeros(2).long()), {"eps": -1.0}, ValueError, "eps must be"),
        ((torch.ones(2), torch.zeros(2).long()), {"correction": 2}, ValueError, "correction"),
    ],
)
def test_bad_input_names_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        group_advantage(*arguments, **options)
