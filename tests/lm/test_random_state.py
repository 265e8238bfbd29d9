"""Random numbers depend on a key and on nothing around it."""

from __future__ import annotations

import random

import numpy
import torch

from em_kernels.lm.random_state import seed_of, seeded


def draw() -> tuple:
    return random.random(), numpy.random.rand(), torch.rand(()).item()


def test_every_key_has_numbers_of_its_own():
    keys = [(0,), (1,), (0, 1), (1, 0), (0, 0, 1), (11,), (1, 1)]
    drawn = []
    for key in keys:
        with seeded(*key):
            drawn.append(draw())
        random.seed(len(drawn))
        with seeded(*key):
            assert draw() == drawn[-1]
    assert all(len(set(numbers)) == len(keys) for numbers in zip(*drawn))
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert all(0 <= seed_of(*key) < 2**63 for key in keys)


def test_the_state_around_is_left_alone_after_an_error_too():
    torch.manual_seed(3)
    random.seed(3)
    numpy.random.seed(3)
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    try:
        with seeded(5):
            draw()
            raise KeyError
    except KeyError:
        pass
    assert random.getstate() == states[0]
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
