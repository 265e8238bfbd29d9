"""Every argument of every public function: what it takes is taken, all else is refused by name."""

from __future__ import annotations

import inspect
import re

import hypothesis.strategies as st
import pytest
import torch
from helpers import DTYPES
from hypothesis import given, note

import em_kernels as em
from em_kernels import evaluator, objectives
from em_kernels.evaluator import statistics
from fuzz import objective_tables, statistics_tables, tables
from fuzz.budget import examples
from fuzz.kinds import Place

CALLED = [*tables.FUNCTIONS, *objective_tables.FUNCTIONS, *statistics_tables.FUNCTIONS]
ALL = [*CALLED, *statistics_tables.REFUSALS]
FUNCTIONS = pytest.mark.parametrize("function", ALL, ids=lambda f: f.name)


def place_of(draw, function) -> Place:
    """Objectives are of (answers, tokens); the operators of any leading shape."""
    of_tokens = function in objective_tables.FUNCTIONS
    dimensions = (2, 2) if of_tokens else (0, 3)
    sizes = st.integers(0, 4)
    lead = tuple(draw(st.lists(sizes, min_size=dimensions[0], max_size=dimensions[1])))
    dtype = draw(st.sampled_from(DTYPES))
    return Place(
        draw, lead, draw(st.integers(1 + of_tokens, 40)), draw(st.integers(1, 8)), dtype, {}
    )


def shown(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"<{value.dtype} {tuple(value.shape)} {value.layout} {value.device}>"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shown, value))})"
    return repr(value)


def told(arguments: dict) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())


def test_every_public_name_is_here():
    functions = {function.name for function in ALL}
    assert set(em.__all__) - set(tables.RESULTS) <= functions
    assert set(objectives.__all__) - set(objective_tables.RESULTS) <= functions
    others = {*statistics_tables.RESULTS, *statistics_tables.OF_FILES}
    assert set(evaluator.__all__) - others <= functions
    made_here = (f for f in vars(statistics).values() if inspect.isfunction(f))
    estimators = {f.__name__ for f in made_here if f.__module__ == statistics.__name__}
    public = {name for name in estimators if not name.startswith(("_", "require"))}
    assert public <= functions


@FUNCTIONS
def test_every_parameter_has_a_strategy(function):
    inputs = set(function.needed) if inspect.isclass(function.function) else set()
    of_forward = {"mask", "bias", "segment_ids"} if "Loss" in function.name else set()
    named = set(function.parameters())
    assert named <= set(function.kinds), named - set(function.kinds)
    if not inspect.isclass(function.function):
        assert set(function.kinds) == named, set(function.kinds) - named
    assert set(function.kinds) - named <= inputs | of_forward | {"scores"}


@pytest.mark.filterwarnings("ignore:group_advantage")
@pytest.mark.parametrize("function", CALLED, ids=lambda f: f.name)
@examples(8)
@given(data=st.data())
def test_what_goes_together_is_taken(function, data):
    arguments = function.draw(place_of(data.draw, function))
    note(told(arguments))
    function.run(**arguments)


@FUNCTIONS
@examples(2)
@given(data=st.data())
def test_what_cannot_be_is_refused_by_name(function, data):
    """All of it, one argument at a time, of a call that is good otherwise."""
    place = place_of(data.draw, function)
    arguments = function.draw(place, every=False)
    wrong = []
    for name, kind in function.kinds.items():
        for value in kind.bad(place):
            reason = accepted(function, arguments, name, value)
            if reason is not None:
                wrong.append(f"{name}={shown(value)}: {reason}")
    assert not wrong, "\n".join([f"{function.name}({told(arguments)}) with", *wrong])


def accepted(function, arguments, name: str, value: object) -> str | None:
    """What is wrong with how the function takes a bad value."""
    try:
        function.run(**{**arguments, name: value})
    except (TypeError, ValueError) as error:
        said = "|".join(function.alike.get(name, (name,)))
        return None if re.search(rf"\b({said})\b", str(error)) else f"not named: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "accepted"
