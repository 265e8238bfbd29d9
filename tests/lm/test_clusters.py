"""Answers by meaning: one clustering, one semantic entropy, one majority for all who ask."""

import importlib.util
import math

import pytest
import torch

from em_kernels.evaluator.statistics import majority_at_k
from em_kernels.lm.judge.clusters import (
    cluster_answers,
    cluster_final_answers,
    cluster_responses,
    majority,
    semantic_entropy,
    shares,
    vote_margin,
)
from em_kernels.lm.judge.judges import make_judge
from em_kernels.objectives import answer_clusters, empo_reward, majority_reward
from em_kernels.objectives import semantic_entropy as of_rows
from em_kernels.objectives.empo import NO_ANSWER

VOTES = [
    [],
    [None],
    [None, None],
    [0],
    [0, 0, 0],
    [0, 1],
    [0, 1, 1, 0],
    [0, 1, 1, 2, 2, None],
    [None, 0, 1, 2, 3, None],
    [0, 1, 0, 2, 0, 1, None, 1],
]


def as_tensor(votes):
    return torch.tensor([NO_ANSWER if v is None else v for v in votes], dtype=torch.int64)


def test_an_answer_joins_the_first_cluster_whose_first_member_it_is_the_same_as():
    seen = []

    def same(answer, first):
        seen.append((answer, first))
        return abs(int(answer) - int(first)) <= 1

    assert cluster_answers(["1", None, "2", "3", "2"], same) == [0, None, 0, 1, 0]
    assert seen == [("2", "1"), ("3", "1"), ("2", "1")]


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
def test_expressions_are_clustered_by_the_judge(patient_judge):
    finals = ["x+1", "1+x", "2", None, "4/2"]
    assert cluster_final_answers(finals) == [0, 0, 1, None, 1]
    assert cluster_final_answers(finals, make_judge("exact")) == [0, 1, 2, None, 2]
    responses = ["" if f is None else f"\\boxed{{{f}}}" for f in finals]
    assert cluster_responses(responses) == [0, 0, 1, None, 1]
    assert semantic_entropy([0, 0, 1, 1]) == pytest.approx(math.log(2))


@pytest.mark.parametrize("votes", VOTES, ids=str)
def test_rewards_of_tensors_are_those_of_the_votes(votes):
    prompt = torch.zeros(len(votes), dtype=torch.int64)
    cluster, n = as_tensor(votes), len(votes)
    assert empo_reward(cluster, prompt).tolist() == pytest.approx(shares(votes))
    assert of_rows(cluster, prompt).tolist() == pytest.approx([semantic_entropy(votes)] * n)
    elected = majority(votes)
    expected = [float(v is not None and v == elected) for v in votes]
    assert majority_reward(cluster, prompt).tolist() == expected


@pytest.mark.parametrize("votes", VOTES, ids=str)
def test_semantic_entropy_is_that_of_the_shares_of_the_clusters(votes):
    meanings = [("alone", i) if v is None else v for i, v in enumerate(votes)]
    p = [meanings.count(m) / len(votes) for m in dict.fromkeys(meanings)]
    assert semantic_entropy(votes) == pytest.approx(-sum(x * math.log(x) for x in p))


@pytest.mark.parametrize(
    "votes, elected",
    [
        ([0, 1, 1], 1),
        ([0, 1, 1, 0], 0),
        ([0, 1, 2], 0),
        ([0, 1, 1, 2, 2], 1),
        ([None, None, None, 0], 0),
        ([None, None], None),
        ([], None),
    ],
)
def test_of_a_tie_the_answer_that_came_first_is_elected_in_votes_and_rewards(votes, elected):
    assert majority(votes) == elected
    for right in {0, 1, 2} if votes else ():
        correct = [v == right for v in votes]
        assert majority_at_k(votes, correct, len(votes)) == float(elected == right)
    prompt = torch.zeros(len(votes), dtype=torch.int64)
    rewarded = majority_reward(as_tensor(votes), prompt).bool().tolist()
    assert rewarded == [v is not None and v == elected for v in votes]


def test_prompts_are_clustered_apart_whatever_the_order_of_their_rows():
    clusters = answer_clusters(["#### 1", "#### 2", "#### 2", "so", "#### 1"], [3, 5, 3, 5, 3])
    assert clusters.tolist() == [0, 0, 1, NO_ANSWER, 0]
    prompt = torch.tensor([3, 5, 3, 5, 3])
    assert majority_reward(clusters, prompt).tolist() == [1, 1, 0, 0, 1]


def test_margin():
    assert vote_margin([0, 0, 0, 1]) == 0.5
    assert vote_margin([0, 0]) == 1.0
    assert vote_margin([0, 1, 1, 2]) == 0.25
    assert vote_margin([None, None]) == vote_margin([]) == 0.0
    assert semantic_entropy([None, None, 0]) == pytest.approx(math.log(3))
    assert semantic_entropy([0, 0, 0]) == 0.0
