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
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from tiny_qwen2 import make_model, make_tokenizer
from trainer_runs import TIMES, without_times

from em_kernels import tiny_math
from em_kernels.trainer import (
    CheckpointError,
    RankError,
    Rollout,
    TrainConfig,
    loop,
    merge_checkpoint,
    train,
)
from em_kernels.trainer.distributed import joined_ranks
from em_kernels.trainer.run import start_run
from em_kernels.trainer.shared_sampling import SharedDraw

SECOND_PROMPT = "Tom has 5 apples and buys 3 more. How many apples does Tom have?"


def config(**changes) -> TrainConfig:
    base = dict(
        model=str(tiny_math.model_path()),
        prompts=(tiny_math.PROMPT, SECOND_PROMPT),
        updates=3,
        responses=7,
        micro_batch=2,
        sample_batch=4,
        learning_rate=2e-4,
        loss_temperature=0.7,
        sampling_temperature=0.9,
        top_k=50,
        max_new_tokens=40,
        device="cpu",
    )
    return TrainConfig(**{**base, **changes})


def report(result) -> dict:
    state = {name: value.clone() for name, value in result.model.state_dict().items()}
    checkpoint = result.checkpoint and str(result.checkpoint)
    return {"metrics": result.metrics, "state": state, "checkpoint": checkpoint}


def outcome(call) -> tuple[str, str]:
    """Type and text of the error that a call ends with."""
    try:
        call()
    except BaseException as error:
        return type(error).__name__, str(error)
    return "no error", ""


# Functions for one process or for each of two; `folder` is shared by all of them.

SAME = {
    "a run": {},
    "three answers": dict(responses=3, reduction="sequence_mean"),
    "one answer": dict(responses=1),
    "micro-batches of one": dict(responses=4, micro_batch=1, prompts=tiny_math.PROMPT),
    "one micro-batch": dict(micro_batch=64, sample_batch=64),
    "official": dict(compat="official", responses=5),
    "gradient checkpointing": dict(gradient_checkpointing=True),
    "no truncation": dict(top_p=1.0, top_k=0, repetition_penalty=1.0, sampling_temperature=1.0),
}


def same_run(name: str):
    def run(folder: Path) -> dict:
        return report(train(config(**SAME[name]), progress=False))

    return run


def tied_and_frozen(folder: Path) -> dict:
    """Embeddings tied to the head, a frozen layer, a model that is passed."""
    model = make_model()
    model.model.layers[0].requires_grad_(False)
    settings = config(model=None, prompts=("1 2 a", "3"), max_new_tokens=12, top_k=0)
    result = train(settings, model, make_tokenizer(), progress=False)
    assert result.model is model
    return report(result)


def made_rollout() -> Rollout:
    """Five answers of 1 to 9 tokens to prompts of 5 tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 400, (5, 14), generator=generator)
    column = torch.arange(14)
    end = 5 + torch.tensor([9, 1, 4, 7, 2])[:, None]
    attended = column < end
    return Rollout(ids, attended, attended & (column >= 5), torch.ones(5).bool())


def gradients(**changes) -> dict:
    """Loss and gradient of a given rollout."""
    settings = config(responses=5, **changes)
    with joined_ranks("cpu") as ranks:
        run = start_run(settings, None, None, False, ranks)
        batch = loop._batch(run, made_rollout(), loop._entropy_minimisation(settings))
        loss, entropy = loop._accumulate_gradients(run, batch)
        grads = [p.grad for p in run.weights.trained.parameters()]
        grads = [g.full_tensor() if ranks.size > 1 else g for g in grads]
    dtypes = {p.dtype for p in run.weights.trained.parameters()} | {g.dtype for g in grads}
    flat = torch.cat([g.flatten() for g in grads])
    return {"loss": loss, "entropy": entropy, "gradient": flat, "dtypes": dtypes}


def cuts(folder: Path) -> dict:
    return {size: gradients(micro_batch=size) for size in (1, 2, 3, 5)}


def bfloat16(folder: Path) -> dict:
    return gradients(dtype="bfloat16")


def bfloat16_run(folder: Path) -> dict:
    settings = config(dtype="bfloat16", output=folder / "bfloat16", updates=2)
    return report(train(settings, progress=False))


def hooks(folder: Path) -> dict:
    """on_step sees the whole model, on rank 0 only; what it returns is in everyone's metrics."""
    seen = []

    def look(line: dict, model) -> dict:
        torch.rand(3)
        seen.append(line["update"])
        return {"weights": sum(p.double().abs().sum().item() for p in model.parameters())}

    result = train(config(updates=2), progress=False, on_step=look)
    return {"seen": seen, **report(result)}


GO_ON = {
    "two": dict(updates=4),
    "shards": dict(updates=4, shards_only=True),
    "one-then-two": dict(updates=4),
}


def resumed(folder: Path) -> dict:
    """Runs of two ranks that another number of ranks goes on with, and the other way round."""
    first = dist.get_rank() == 0
    two = config(output=folder / "two", updates=2, save_every=1, keep_checkpoints=1)
    train(two, progress=False)
    if first:
        shutil.copytree(folder / "two", folder / "two-then-one")
    train(config(output=folder / "shards", updates=2, shards_only=True), progress=False)
    if first:
        shutil.copytree(folder / "shards", folder / "shards-then-one")
    again = {"whole": report(train(config(updates=4), progress=False))}
    for name, changes in GO_ON.items():
        dist.barrier()
        settings = dataclasses.replace(two, **changes, output=str(folder / name))
        again[name] = report(train(settings, resume=True, progress=False))
    return again


def errors(folder: Path) -> dict:
    rank = dist.get_rank()
    found = {}

    def fail_on_one(rollout, mask):
        if rank == 1:
            raise ValueError("advantage must be finite, got nan")
        return mask / mask.sum(), None

    def poison(rollout, mask):
        return mask * torch.inf, None

    def stop(line, model):
        raise KeyboardInterrupt

    run = dict(progress=False)
    found["objective"] = outcome(lambda: train(config(), objective=fail_on_one, **run))
    found["not finite"] = outcome(lambda: train(config(), objective=poison, **run))
    found["interrupted"] = outcome(lambda: train(config(), on_step=stop, **run))
    missing = config(model=str(folder / "nothing") if rank == 1 else config().model)
    found["model"] = outcome(lambda: train(missing, **run))
    found["device"] = outcome(lambda: train(config(device="cuda:1"), **run))
    taken = config(output=folder / "taken", updates=1)
    found["first run"] = outcome(lambda: train(taken, **run))
    found["taken"] = outcome(lambda: train(taken, **run))
    blocked = config(output=folder / "blocked", updates=1)
    if rank == 0:
        (folder / "blocked").mkdir()
        (folder / "blocked" / ".checkpoint-1.shards.tmp").write_text("in the way")
    dist.barrier()
    found["shards"] = outcome(lambda: train(blocked, **run))
    found["afterwards"] = outcome(lambda: train(config(updates=1), **run))
    return found


ON_TWO_RANKS = {
    **{name: same_run(name) for name in SAME},
    "tied and frozen": tied_and_frozen,
    "cuts": cuts,
    "bfloat16": bfloat16,
    "bfloat16 run": bfloat16_run,
    "hooks": hooks,
    "resumed": resumed,
    "errors": errors,
}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    transformers.utils.logging.disable_progress_bar()
    reports, seconds = {}, {}
    for name, function in ON_TWO_RANKS.items():
        start = time.perf_counter()
        try:
            reports[name] = function(folder)
        except BaseException:
            reports[name] = traceback.format_exc()
        seconds[name] = time.perf_counter() - start
    torch.save((reports, seconds), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


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
    for report in ranks("cuts"):
        for size, actual in report.items():
            assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6), size
            assert actual["entropy"] == pytest.approx(expected["entropy"], rel=1e-6), size
            difference = (actual["gradient"] - expected["gradient"]).norm()
            assert difference <= 1e-5 * expected["gradient"].norm(), size


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
    expected = report(train(config(updates=4), progress=False))
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
        settings = config(output=shared / name, updates=4, **options)
        check_same_run(report(train(settings, resume=True, progress=False)), expected)
        lines = [json.loads(line) for line in (shared / name / "metrics.jsonl").open()]
        assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert [p.name for p in (shared / "two").glob("*checkpoint-*")] == ["checkpoint-4"]


def test_sharded_checkpoints_hold_a_part_of_each_rank_and_merge(shared, ranks, tmp_path):
    state = ranks("resumed")[0]["shards"]["state"]
    checkpoint = shared / "shards" / "checkpoint-4"
    parts = sorted((checkpoint / "shards").glob("*.distcp"))
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) == 2 and min(sizes) > 0.5 * max(sizes)
    assert not list(checkpoint.glob("*.safetensors"))
    merged = merge_checkpoint(checkpoint, tmp_path / "merged")
    for folder in (merged, shared / "two" / "checkpoint-4"):
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
        ("taken", 0, "ValueError", "holds a run already"),
        ("shards", 0, "CheckpointError", "cannot write"),
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


def test_a_shared_draw_is_that_of_multinomial():
    scores = torch.randn(5, 5, 30)
    torch.manual_seed(4)
    expected = [torch.multinomial(s.softmax(-1), 1)[:, 0] for s in scores]
    for rows in (torch.tensor([0, 1, 2]), torch.tensor([3, 4])):
        torch.manual_seed(4)
        draw = SharedDraw(lambda ids, scores: scores, rows, 5, 30)
        for step in range(3):
            assert torch.equal(draw(None, scores[step][rows]).argmax(-1), expected[step][rows])
        draw.catch_up(4, torch.device("cpu"))
        assert torch.equal(draw(None, scores[4][rows]).argmax(-1), expected[4][rows])


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", "em_kernels", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_line_under_torchrun(tmp_path):
    expected = config(updates=1)
    settings = [
        *("--prompt", expected.prompts[0], "--prompt", expected.prompts[1]),
        *("--responses", "7", "--micro-batch", "2", "--sample-batch", "4"),
        *("--learning-rate", "2e-4", "--loss-temperature", "0.7", "--sampling-temperature", "0.9"),
        *("--top-k", "50", "--max-new-tokens", "40", "--device", "cpu", "--updates", "1"),
    ]
    run = str(tmp_path / "run")
    process = torchrun("train", "--model", expected.model, "--output", run, *settings)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("checkpoint: ") == 1
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    theirs = train(expected, progress=False).metrics[0]
    assert set(line) == set(theirs) and set(TIMES) < set(line)
    assert without_times([line])[0] == pytest.approx(without_times([theirs])[0], rel=1e-4)
