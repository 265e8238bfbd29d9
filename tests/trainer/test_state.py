"""The parts of a checkpoint: read by any number of ranks, and nothing that they hold is run."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile import Evil
from rl_runs import PROBLEMS, rl_settings, run_rl
from tiny_qwen2 import make_model, make_tokenizer, save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from trainer_runs import settings, without_times

from em_kernels.lm.ranks import Ranks
from em_kernels.trainer import CheckpointError, merge_checkpoint, train
from em_kernels.trainer.state import load_optimizer, load_weights_from_parts, save_parts


def adamw(model, steps: int = 1) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(input_ids=torch.tensor([[4, 5]])).logits.sum().backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def checkpoint(tmp_path):
    """A run of one update, in parts."""
    folder = tmp_path / "run" / "checkpoint-1"
    model = make_model()
    model.config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_parts(folder / "shards", model, adamw(model), weights=True, ranks=Ranks())
    return folder


def test_what_is_written_is_read(checkpoint):
    expected = make_model()
    moved = adamw(expected)
    model = make_model(seed=5)
    load_weights_from_parts(checkpoint, model, Ranks())
    optimizer = adamw(model, steps=0)
    load_optimizer(checkpoint, model, optimizer, Ranks())
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        assert torch.equal(ours, theirs)
        for name, value in moved.state[theirs].items():
            assert torch.equal(optimizer.state[ours][name], value)
            assert optimizer.state[ours][name].dtype == value.dtype


def test_the_state_of_another_model_is_refused(checkpoint):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"is of another model: it has optimizer\.state\."):
        load_optimizer(checkpoint, model, optimizer, Ranks())


def readers(checkpoint):
    """What reads the parts, and is to refuse them."""
    run, model = checkpoint.parent, str(checkpoint)
    yield lambda: merge_checkpoint(checkpoint, run / "merged")
    yield lambda: load_optimizer(checkpoint, make_model(), adamw(make_model(), 0), Ranks())
    config = settings(model=model, output=str(run), updates=2)
    yield lambda: train(config, resume=True, progress=False)


def write_config(checkpoint) -> None:
    from em_kernels.trainer.checkpoint import write_config

    write_config(checkpoint.parent, settings(model=str(checkpoint), output=checkpoint.parent))


def test_metadata_that_would_run_something_is_refused(checkpoint, tmp_path):
    write_config(checkpoint)
    path = checkpoint / "shards" / ".metadata"
    path.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for read in readers(checkpoint):
        with pytest.raises(CheckpointError, match=r"cannot read .*names posix\.mkdir"):
            read()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "held",
    [{"a": 1}, torch.nn.Linear(1, 1), print, dcp.FileSystemReader("x")],
    ids=("dict", "module", "function", "reader"),
)
def test_metadata_that_is_something_else_is_refused(checkpoint, held):
    (checkpoint / "shards" / ".metadata").write_bytes(pickle.dumps(held))
    with pytest.raises(CheckpointError, match="cannot read"):
        merge_checkpoint(checkpoint, checkpoint.parent / "merged")


def test_pickled_values_in_the_place_of_tensors_are_refused(checkpoint, tmp_path):
    """The metadata may say of a weight that it is bytes, which torch unpickles."""
    shards = checkpoint / "shards"
    name = "model.model.norm.weight"
    shutil.rmtree(shards)
    dcp.save({name: Evil(tmp_path / "ran")}, checkpoint_id=shards, no_dist=True)
    found = dcp.FileSystemReader(shards).read_metadata()
    assert isinstance(found.state_dict_metadata[name], BytesStorageMetadata)
    model = make_model()
    only = torch.nn.Module()
    only.model = torch.nn.Module()
    only.model.norm = model.model.norm
    with pytest.raises(CheckpointError, match=r"norm\.weight is no tensor"):
        load_weights_from_parts(checkpoint, only, Ranks())
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_before_the_parts_is_gone_on_with(tmp_path):
    """Weights for transformers and trainer_state.pt, as one process used to write them."""
    model = save(tmp_path / "model")
    config = settings(model=model, output=tmp_path / "new", updates=2)
    whole = train(config, progress=False)
    old = shutil.copytree(tmp_path / "new", tmp_path / "old") / "checkpoint-2"
    trained = whole.model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, weight_decay=0.0)
    load_optimizer(old, trained, optimizer, Ranks())
    shutil.rmtree(old / "shards")
    state = {"update": 2, "optimizer": optimizer.state_dict(), "random": {}}
    torch.save(state, old / "trainer_state.pt")
    again = [
        train(replace(config, output=str(tmp_path / name), updates=3), resume=True, progress=False)
        for name in ("new", "old")
    ]
    assert without_times(again[0].metrics) == without_times(again[1].metrics)
    for name, value in again[0].model.state_dict().items():
        assert torch.equal(again[1].model.state_dict()[name], value)


def test_a_run_without_a_step_is_saved_and_resumed(tmp_path):
    """The optimiser has no state then."""
    wrong = tuple((problem, "12345678") for problem, _ in PROBLEMS)
    config = rl_settings(
        objective="grpo++", reward="verified", problems=wrong, updates=1, output=tmp_path
    )
    assert run_rl(config).metrics[0]["optimizer_steps"] == 0
    again = run_rl(replace(config, updates=2), resume=True)
    assert [line["update"] for line in again.metrics] == [1, 2]
