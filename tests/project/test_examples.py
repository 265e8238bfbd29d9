"""Every example runs offline, does what it says and fits on a page."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import error

from em_kernels import tiny_math

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))


def load(name: str):
    """The example as a module; it does not run."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def trl():
    """TRL and its data sets, switched back afterwards."""
    module = pytest.importorskip("em_kernels.integrations.trl", exc_type=ImportError)
    pytest.importorskip("datasets")
    yield module
    module.remove_from_trl()


def test_an_example_is_at_most_60_lines():
    assert len(EXAMPLES) >= 6
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 60, path.name


def test_every_example_is_named_in_the_readme():
    readme = (FOLDER.parent / "README.md").read_text()
    assert [path.name for path in EXAMPLES if f"examples/{path.name}" not in readme] == []


def test_pytorch_loop():
    losses = load("pytorch_loop").main()
    assert losses[-1] < 0.7 * losses[0]


def test_transformers_stats_are_those_of_the_lines_they_replace():
    logprob, entropy = load("transformers_stats").main()
    assert logprob.shape == entropy.shape
    assert ((logprob < 0) == (entropy > 0)).all() and (logprob < 0).sum() > 50


def test_transformers_trainer():
    example = load("transformers_trainer")
    losses = example.main()
    assert losses[-1] < 0.5 * losses[0]
    assert example.main(0.5)[-1] < losses[0] * 2


def test_trl_grpo(trl, monkeypatch):
    calls = []
    linear = trl.linear_softmax_stats
    monkeypatch.setattr(
        trl, "linear_softmax_stats", lambda *a, **k: calls.append(1) or linear(*a, **k)
    )
    lines = load("trl_grpo").main()
    assert len(lines) == 3 and len(calls) >= 3
    assert all(line["entropy"] > 0 and line["grad_norm"] > 0 for line in lines)


def updates_of(trainer_class, **settings):
    """How two updates change the weights."""
    from transformers import AutoModelForCausalLM

    trained = []

    class Remember(trainer_class):
        def train(self):
            super().train()
            trained.append(self.model)

    load("trl_grpo").main(Remember, top_entropy_quantile=1.0, max_steps=2, **settings)
    before = AutoModelForCausalLM.from_pretrained(tiny_math.model_path()).parameters()
    changes = [(p - q).detach().flatten() for p, q in zip(trained[0].parameters(), before)]
    return torch.cat(changes)


def test_trl_clip_cov_without_a_choice_is_grpo(trl):
    """Where no token is chosen, or KL-Cov is on-policy, the trainer is TRL's without clipping."""
    example = load("trl_clip_cov")
    expected = updates_of(example.GRPOTrainer, epsilon=1.0, epsilon_high=1.0)
    apart = dict(generator=torch.Generator())  # or the choice would take from the sampling's
    for method, options in (("clip_cov", dict(lower=1e6, upper=1e7, **apart)), ("kl_cov", {})):
        choice = dict(method=method, ratio=0.1, options=options)
        actual = updates_of(type("Cov", (example.CovTrainer,), choice))
        assert error(actual, expected) < 0.01, method
    choice = dict(method="clip_cov", ratio=0.5, options=dict(lower=0.0, upper=1e7))
    chosen = updates_of(type("Cov", (example.CovTrainer,), choice))
    assert error(chosen, expected) > 0.1


@pytest.mark.parametrize("method", ("clip_cov", "kl_cov"))
def test_trl_clip_cov_chooses_over_the_whole_batch(trl, method):
    example = load("trl_clip_cov")
    choice = dict(
        method=method, ratio=0.05, options=dict(lower=0.0) if method == "clip_cov" else {}
    )
    cut = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, num_iterations=2)
    batches = []

    class Watch(type("Cov", (example.CovTrainer,), choice)):
        def _generate_and_score_completions(self, inputs):
            batches.append(super()._generate_and_score_completions(inputs))
            return batches[-1]

    lines = load("trl_grpo").main(Watch, max_steps=2, **cut)
    for batch in batches:
        assert batch["chosen"].shape[0] == 16  # all four micro-batches
        assert batch["chosen"].sum() == max(int(0.05 * batch["completion_mask"].sum()), 1)
    assert lines[1]["policy_kl"] > 0 and lines[1]["selected_fraction"] > 0


def test_verl_head(capsys):
    from em_kernels.integrations import verl

    try:
        logprob, entropy = load("verl_head").main()
    finally:
        verl.remove_from_verl()
    assert (logprob <= 0).all() and (entropy >= 0).all()
    assert "mean entropy" in capsys.readouterr().out


@pytest.mark.parametrize("name", ("transformers_stats",))
def test_an_example_runs_as_a_program(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert "negative log-likelihood a token" in finished.stdout


@pytest.mark.parametrize(
    "example, said",
    (
        ("tensor_parallel.py", r"rank (\d): 500 of 1000 rows, H (\S+) nats, error ([\d.e+-]+)"),
        ("context_parallel.py", r"rank (\d): 24 of 48 tokens, loss (\S+), error ([\d.e+-]+)"),
    ),
)
def test_two_processes_have_what_one_has(example, said):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [sys.executable, *command, FOLDER / example],
        cwd=FOLDER.parent,
        env=dict(os.environ, PYTHONPATH=str(FOLDER.parent), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    # The processes share a pipe: their lines come whole, but may come side by side.
    found = re.findall(said, finished.stdout)
    (first, h, e), (second, same, f) = sorted(found)
    assert (first, second) == ("0", "1") and h == same
    assert float(e) < 1e-6 and float(f) < 1e-6
