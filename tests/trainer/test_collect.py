"""What an update is collected of: problems in turn, and answers of several rounds."""

import pytest
import torch
from rl_runs import rl_settings
from tiny_qwen2 import make_tokenizer

from em_kernels.trainer.collect import ProblemOrder, join_answers
from em_kernels.trainer.rewards import Answers


@pytest.mark.parametrize("unknown", [0, 1])
def test_answers_of_rounds_with_and_without_right_ones_are_joined(unknown):
    group, ones = torch.tensor([0, 0]), torch.ones(2)
    parts = [Answers(group, group + 3, ones, None, ones) for _ in range(2)]
    parts[unknown] = parts[unknown]._replace(correct=None)
    joined = join_answers(parts)
    assert joined.correct is None and joined.cluster is None
    assert joined.group.tolist() == [0, 0, 1, 1] and joined.reward.tolist() == [1.0] * 4


def test_problems_take_turns_in_a_shuffled_order():
    config = rl_settings(problems=tuple((str(i), "1") for i in range(6)))
    order = ProblemOrder(config, make_tokenizer())
    laps = [[order.turn(lap * 6 + i) for i in range(6)] for lap in range(3)]
    assert all(sorted(lap) == list(range(6)) for lap in laps)
    assert laps[0] != laps[1] or laps[1] != laps[2]
