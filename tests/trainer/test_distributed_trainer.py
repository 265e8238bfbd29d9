"""The trainer in two processes (gloo): the numbers of one process, checkpoints, errors.

Two processes are started once and run every function of `ON_TWO_RANKS`; the tests compare what they
report with the same function in this process, which is one rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import transformers
from trainer_runs import TIMES, without_times
from two_rank_runs import (
    ADAPTERS,
    GO_ON,
    ON_TWO_RANKS,
    SAME,
    adapted_model,
    config,
    gradients,
    report,
    work,
)

from em_kernels import cli
from em_kernels.trainer import (
    CheckpointError,
    ModelError,
    RankError,
    load_model,
    merge_checkpoint,
    train,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """The folder of the two processes, after they have ended."""
    folder = tmp_path_factory.mktemp("ranks")
    train(config(output=folder / "one-then-two", updates=2), progress=False)
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.fixture(scope="module")
def ranks(shared):
    """(name) -> the reports of rank 0 and rank 1."""
    found = [torch.load(shared / f"rank{rank}.pt", weights_only=False)[0] for rank in (0, 1)]

    def reports(name: str) -> list:
        for one in found:
            assert not isinstance(one[name], str), one[name]
        return [one[name] for one in found]

    return reports


def check_same_run(actual: dict, expected: dict, tolerance: float = 1e-4) -> None:
    lines = zip(without_times(actual["metrics"]), without_times(expected["metrics"]), strict=True)
    for ours, theirs in lines:
        assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-7)
    for name, value in expected["state"].items():
        assert (actual["state"][name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("name", [*SAME, "tied and frozen"])
def test_two_ranks_give_the_numbers_of_one(ranks, name):
    expected = ON_TWO_RANKS[name](None)
    first, second = ranks(name)
    check_same_run(first, expected)
    assert second["metrics"] == first["metrics"]
    for key, value in first["state"].items():
        assert torch.equal(second["state"][key], value)


def test_loss_and_gradient_do_not_depend_on_micro_batches_or_ranks(ranks):
    expected = gradients(micro_batch=5)
    for by_size in ranks("cuts"):
        for size, actual in by_size.items():
            assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6), size
            assert actual["entropy"] == pytest.approx(expected["entropy"], rel=1e-6), size
            difference = (actual["gradient"] - expected["gradient"]).norm()
            assert difference <= 1e-5 * expected["gradient"].norm(), size


def test_each_rank_holds_its_half_of_the_parameters(ranks):
    total = gradients()["whole"]
    held = [by_size[1]["held"] for by_size in ranks("cuts")]
    assert sum(held) == total and max(held) < 0.51 * total
    assert [by_size[1]["whole"] for by_size in ranks("cuts")] == [0, 0]


def test_bfloat16_computes_in_bfloat16_around_float32_shards(ranks):
    expected, exact = gradients(dtype="bfloat16"), gradients()
    for actual in ranks("bfloat16"):
        assert actual["dtypes"] == {torch.float32}
        for other, largest in ((expected, 0.1), (exact, 0.1)):
            assert actual["loss"] == pytest.approx(other["loss"], rel=0.02)
            difference = (actual["gradient"] - other["gradient"]).norm()
            assert 1e-4 < difference / other["gradient"].norm() < largest


def test_a_bfloat16_run_trains_and_keeps_float32_weights(ranks):
    expected = train(config(dtype="bfloat16", updates=1), progress=False).metrics[0]
    first, second = ranks("bfloat16 run")
    assert first["metrics"][0]["loss"] == pytest.approx(expected["loss"], rel=0.1)
    assert second["metrics"] == first["metrics"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(first["checkpoint"])
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, first["state"][name])


def test_parameters_and_states_in_bfloat16_are_sharded_too(ranks):
    for found in ranks("narrow"):
        whole, resumed = found["whole"], found["resumed"]
        assert {value.dtype for value in whole["state"].values()} == {torch.bfloat16}
        assert without_times(resumed["metrics"]) == without_times(whole["metrics"])
        for name, value in whole["state"].items():
            assert torch.equal(resumed["state"][name], value), name
        assert found["8bit"][0] in ("ValueError", "RankError")
    messages = [found["8bit"][1] for found in ranks("narrow")]
    assert any("'8bit' is for one process" in message for message in messages)
    one = train(
        config(dtype="pure_bfloat16", optimizer_dtype="bfloat16", long=True, updates=1),
        progress=False,
    )
    expected, actual = one.metrics[0], ranks("narrow")[0]["whole"]["metrics"][0]
    for name in ("loss", "grad_norm", "mean_entropy", "response_length"):
        assert actual[name] == pytest.approx(expected[name], rel=0.02), name


def test_on_step_is_called_on_rank_0_with_the_whole_model(ranks):
    first, second = ranks("hooks")
    assert (first["seen"], second["seen"]) == ([1, 2], [])
    assert second["metrics"] == first["metrics"]
    whole = sum(p.double().abs().sum().item() for p in first["state"].values())
    assert first["metrics"][-1]["weights"] == pytest.approx(whole, rel=1e-12)
    expected = train(config(updates=2), progress=False).metrics
    lines = [{k: v for k, v in line.items() if k != "weights"} for line in first["metrics"]]
    for ours, theirs in zip(without_times(lines), without_times(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_resume_on_another_number_of_ranks_goes_on_with_the_same_numbers(shared, ranks):
    expected = report(train(config(updates=3), progress=False))
    for reports in ranks("resumed"):
        for name in ("whole", *GO_ON):
            check_same_run(reports[name], expected)
        for name in ("two", "shards"):
            whole, again = reports["whole"], reports[name]
            assert without_times(again["metrics"]) == without_times(whole["metrics"])
            assert all(torch.equal(again["state"][key], v) for key, v in whole["state"].items())
    for name, options in (
        ("two-then-one", dict(save_every=1, keep_checkpoints=1)),
        ("shards-then-one", dict(shards_only=True)),
    ):
        settings = config(output=shared / name, updates=3, **options)
        check_same_run(report(train(settings, resume=True, progress=False)), expected)
        lines = [json.loads(line) for line in (shared / name / "metrics.jsonl").open()]
        assert [line["update"] for line in lines] == [1, 2, 3]
    assert [p.name for p in (shared / "two").glob("*checkpoint-*")] == ["checkpoint-3"]


def test_sharded_checkpoints_hold_a_part_of_each_rank_and_merge(shared, ranks, tmp_path):
    state = ranks("resumed")[0]["shards"]["state"]
    checkpoint = shared / "shards" / "checkpoint-3"
    parts = sorted((checkpoint / "shards").glob("*.distcp"))
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) == 2 and min(sizes) > 0.5 * max(sizes)
    assert not list(checkpoint.glob("*.safetensors"))
    with pytest.raises(ModelError, match=r"is in parts: `em-kernels merge .*checkpoint-3`"):
        load_model(str(checkpoint))
    merged = tmp_path / "merged"
    assert cli.main(["merge", str(checkpoint), "--output", str(merged)]) == 0
    for folder in (merged, shared / "two" / "checkpoint-3"):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(v, state[name]) for name, v in loaded.state_dict().items())
        assert loaded.generation_config.eos_token_id == 2
        transformers.AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"output must be a new folder, .*merged is there"):
        merge_checkpoint(checkpoint, merged)
    with pytest.raises(ValueError, match=r"must be a folder with shards/ in it, got .*merged"):
        merge_checkpoint(merged, tmp_path / "again")
    part = shutil.copytree(checkpoint, tmp_path / "damaged") / "shards" / parts[1].name
    part.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*damaged"):
        merge_checkpoint(tmp_path / "damaged", tmp_path / "again")


@pytest.mark.parametrize(
    "name, failing, kind, message",
    [
        ("objective", 1, "ValueError", "advantage must be finite, got nan"),
        ("not finite", 0, "FloatingPointError", "update 1: the loss is"),
        ("interrupted", 0, "KeyboardInterrupt", ""),
        ("model", 1, "ModelError", "no such folder"),
        ("settings", 0, "ValueError", "learning_rate is 0.0001 on rank 0, 0.0002 on rank 1"),
        ("prompts", 0, "ValueError", "prompts is ('xxxxx"),
        ("weights", 0, "ValueError", "the weights of model is '"),
        ("problems", 0, "ValueError", "what lies in problems is '2 rows ("),
        ("taken", 0, "ValueError", "holds a run already"),
        ("shards", 0, "CheckpointError", "cannot write"),
        ("metrics", 0, "CheckpointError", "metrics.jsonl"),
    ],
)
def test_an_error_on_one_rank_ends_the_run_on_all(ranks, name, failing, kind, message):
    reports = ranks("errors")
    own, other = reports[failing][name], reports[1 - failing][name]
    assert own[0] == kind and message in own[1]
    assert other[0] == RankError.__name__
    assert other[1].startswith(f"rank {failing} failed: {kind}: ") and message in other[1]


def test_ranks_go_on_after_an_error_that_all_saw(ranks):
    for found in ranks("errors"):
        assert found["first run"][0] == found["afterwards"][0] == "no error"
        kind, message = found["device"]
        assert kind == "ValueError" and "got 'cuda:1'" in message


def test_a_peft_model_on_two_ranks(shared, ranks, tmp_path):
    """Its adapter and a head of its own: the numbers of one, resumed by two and by one."""
    pytest.importorskip("peft")
    tokenizer = load_model(config().model, "cpu")[1]
    settings = config(**{**ADAPTERS, "updates": 3})
    expected = report(train(settings, adapted_model(), tokenizer, progress=False))
    for found in ranks("adapters"):
        check_same_run(found["whole"], expected, 1e-3)
        assert without_times(found["resumed"]["metrics"]) == without_times(
            found["whole"]["metrics"]
        )
        for name, value in found["whole"]["state"].items():
            assert torch.equal(found["resumed"]["state"][name], value)
        assert "shards_only must be False" in found["shards only"][1]
    one = dataclasses.replace(settings, output=str(shared / "adapters-then-one"))
    check_same_run(report(train(one, resume=True, progress=False)), expected, 1e-3)
    assert [p.name for p in (shared / "adapters").glob("checkpoint-*")] == ["checkpoint-3"]
    checkpoint = shared / "adapters" / "checkpoint-3"
    adapter = load_model(str(checkpoint), "cpu")[0]
    state = ranks("adapters")[0]["whole"]["state"]
    assert all(torch.equal(value, state[name]) for name, value in adapter.state_dict().items())
    parts = sum(part.stat().st_size for part in (checkpoint / "shards").glob("*.distcp"))
    assert parts < sum(4 * p.numel() for p in adapter.parameters())  # of what is trained only
    merged = load_model(str(checkpoint / "merged"), "cpu")[0]
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, rtol=1e-4, atol=1e-4)


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "em_kernels", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_the_command_line_under_torchrun(tmp_path):
    expected = config(updates=1)
    settings = [
        *("--prompt", expected.prompts[0], "--prompt", expected.prompts[1]),
        *("--responses", "7", "--micro-batch", "2", "--sample-batch", "4"),
        *("--learning-rate", "2e-4", "--loss-temperature", "0.7", "--sampling-temperature", "0.9"),
        *("--top-k", "50", "--max-new-tokens", "24", "--device", "cpu", "--updates", "1"),
    ]
    run = str(tmp_path / "run")
    process = torchrun("train", "--model", expected.model, "--output", run, *settings)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("checkpoint: ") == 1
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    theirs = train(expected, progress=False).metrics[0]
    assert set(line) == set(theirs) and set(TIMES) < set(line)
    assert without_times([line])[0] == pytest.approx(without_times([theirs])[0], rel=1e-4)
