"""Clusters, their shares and semantic entropy, by hand."""

import math

import pytest
import torch

from em_kernels.objectives import answer_clusters, empo_mask, empo_reward, semantic_entropy
from em_kernels.objectives.empo import NO_ANSWER

RESPONSES = [
    r"so \boxed{1/2}",
    r"I say \boxed{3}",
    "half, that is 0.5",
    "no idea",
    "#### 3.0",
    r"\boxed{0.5}",
    "again no idea",
]
PROMPT = torch.tensor([0, 0, 0, 0, 1, 1, 0])


def test_equal_final_answers_share_a_cluster():
    clusters = answer_clusters(RESPONSES, PROMPT)
    assert clusters.tolist() == [0, 1, 0, NO_ANSWER, 0, 1, NO_ANSWER]
    assert torch.equal(clusters, answer_clusters(RESPONSES, PROMPT.tolist()))
    assert answer_clusters([], []).tolist() == []


def test_a_callable_decides_what_is_the_same():
    clusters = answer_clusters(
        ["ab", "cd", "abc", "xyz"], [0, 0, 0, 0], same=lambda a, first: len(a) == len(first)
    )
    assert clusters.tolist() == [0, 0, 1, 1]


def test_reward_and_semantic_entropy_by_hand():
    cluster = torch.tensor([0, 1, 0, NO_ANSWER, 0, 1, NO_ANSWER])
    # Prompt 0: five answers in clusters of 2, 1, 1, 1; prompt 1: two in clusters of 1, 1.
    assert empo_reward(cluster, PROMPT).tolist() == pytest.approx(
        [0.4, 0.2, 0.4, 0.2, 0.5, 0.5, 0.2]
    )
    zero, one = -0.4 * math.log(0.4) - 0.6 * math.log(0.2), math.log(2)
    assert semantic_entropy(cluster, PROMPT).tolist() == pytest.approx(
        [zero] * 4 + [one] * 2 + [zero]
    )


def test_agreement_and_single_answers_have_no_entropy():
    cluster, prompt = torch.tensor([0, 0, 0, NO_ANSWER]), torch.tensor([8, 8, 8, 9])
    assert empo_reward(cluster, prompt).tolist() == [1.0] * 4
    assert semantic_entropy(cluster, prompt).tolist() == [0.0] * 4
    assert semantic_entropy(cluster[:0], prompt[:0]).shape == (0,)


def test_thresholds_are_exclusive():
    entropy = torch.tensor([0.0, 0.5, 1.0, 1.5])
    assert empo_mask(entropy, low=0.0, high=1.5).tolist() == [False, True, True, False]


def test_reinforcing_the_share_ascends_the_collision_probability():
    # Answers drawn in exact proportion to p = (1/2, 1/4, 1/4): the mean of r_i grad log p(a_i) is
    # grad (sum_a p_a^2) / 2.
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log().requires_grad_()
    answers = torch.tensor([0, 0, 1, 2])
    reward = empo_reward(answers, torch.zeros(4, dtype=torch.int64))
    p = logits.softmax(-1)
    (expected,) = torch.autograd.grad(p.square().sum() / 2, logits, retain_graph=True)
    (found,) = torch.autograd.grad((reward * p.log()[answers]).mean(), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: answer_clusters(["a"], [0, 1]), ValueError, "prompt must have 1 entries.*got 2"),
        (lambda: empo_reward([0], PROMPT), TypeError, "cluster must be a tensor, got list"),
        (lambda: empo_reward(PROMPT[:2], PROMPT), ValueError, r"prompt must have shape \(2,\)"),
        (lambda: empo_mask(torch.ones(2), low=1.0, high=0.5), ValueError, "high must be above low"),
        (lambda: empo_mask(0.5, low=0.0, high=1.0), TypeError, "entropy must be a tensor"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
