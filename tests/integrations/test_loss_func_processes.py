"""entropy_loss_func and em_outputs under DDP, FSDP and accelerate: two processes have the loss and
gradient of one, which takes them from the model's logits by the textbook."""

from __future__ import annotations

import pytest
from distributed import run_on_ranks
from helpers import error

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from loss_func_runs import RUNS, whole


def run_case(name):
    """In one of the processes."""
    return RUNS[name][-1]()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """name -> what each of two processes returned."""
    return run_on_ranks(2, run_case, list(RUNS), tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def expected():
    wanted = {(model, loss) for model, loss, _ in RUNS.values()}
    return {case: whole(*case) for case in wanted}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_loss_and_gradient_of_one(ranks, expected, name):
    model, loss, _ = RUNS[name]
    want = expected[model, loss]
    coarse = "bf16" in name
    norm = want["gradient"].norm().item()
    for result in ranks[name]:
        assert not isinstance(result, str), result
        assert result["losses"] == pytest.approx(
            [want["loss"]] * len(result["losses"]), rel=1e-2 if coarse else 1e-6
        )
        assert len(result["losses"]) >= len(result["gradients"]) > 0
        for gradient in result["gradients"]:
            assert error(gradient, want["gradient"]) < (0.1 if coarse else 1e-6)
        assert result.get("norms", []) == pytest.approx(
            [norm] * len(result.get("norms", [])), rel=0.1 if coarse else 1e-6
        )
