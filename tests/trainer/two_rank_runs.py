"""What the two processes of test_distributed_trainer.py run, one after the other."""

from __future__ import annotations

import importlib.util
import shutil
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tiny_qwen2 import make_model, make_tokenizer

from em_kernels import tiny_math
from em_kernels.lm.ranks import joined_ranks
from em_kernels.trainer import RLConfig, Rollout, TrainConfig, load_model, train
from em_kernels.trainer.entropy_update import EntropyUpdate, entropy_minimisation
from em_kernels.trainer.policy_update import accumulate_gradients
from em_kernels.trainer.run import start_run

SECOND_PROMPT = "Tom has 5 apples and buys 3 more. How many apples does Tom have?"


def config(**changes) -> TrainConfig:
    base = dict(
        model=str(tiny_math.model_path()),
        prompts=(tiny_math.PROMPT, SECOND_PROMPT),
        updates=2,
        responses=7,
        micro_batch=2,
        sample_batch=4,
        learning_rate=2e-4,
        loss_temperature=0.7,
        sampling_temperature=0.9,
        top_k=50,
        max_new_tokens=24,
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
    "three answers": dict(responses=3, reduction="sequence_mean", gradient_checkpointing=True),
    "one answer": dict(responses=1),
    "one micro-batch": dict(
        micro_batch=64,
        sample_batch=64,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        sampling_temperature=1.0,
    ),
    "official": dict(compat="official", responses=5),
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


ADAPTERS = dict(updates=2, save_every=1, keep_checkpoints=1, learning_rate=1e-3)


def adapted_model():
    """LoRA, and a head of its own beside the embeddings that it was tied to."""
    import peft

    model = load_model(config().model, "cpu")[0]
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapter.modules_to_save = ["lm_head"]
    return peft.get_peft_model(model, adapter)


def adapters(folder: Path) -> dict:
    """A PEFT model on two ranks, without and with an interruption, and merged at the end."""
    tokenizer = load_model(config().model, "cpu")[1]

    def go(output: Path | None, resume: bool = False, **changes) -> dict:
        settings = config(**{**ADAPTERS, **changes}, output=output)
        arguments = (settings, adapted_model(), tokenizer)
        return report(train(*arguments, resume=resume, progress=False))

    whole = go(None, updates=3)
    go(folder / "adapters")
    if dist.get_rank() == 0:
        shutil.copytree(folder / "adapters", folder / "adapters-then-one")
    dist.barrier()
    resumed = go(folder / "adapters", resume=True, updates=3, save_merged=True)
    no_weights = outcome(lambda: go(None, shards_only=True))
    return {"whole": whole, "resumed": resumed, "shards only": no_weights}


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
        update = EntropyUpdate(run, entropy_minimisation(settings))
        parts = update.parts(update.weigh(made_rollout()))
        sums = accumulate_gradients(run, 1, 0, parts, update.loss)
        grads = [p.grad for p in run.strategy.trained.parameters()]
        grads = [g.full_tensor() if ranks.size > 1 else g for g in grads]
        held = sum(
            p.to_local().numel() if ranks.size > 1 else 0 for p in run.strategy.trained.parameters()
        )
        whole = sum(p.numel() for p in run.model.parameters())
    dtypes = {p.dtype for p in run.strategy.trained.parameters()} | {g.dtype for g in grads}
    flat = torch.cat([g.flatten() for g in grads])
    return {
        "loss": sums["loss"],
        "entropy": sums["mean_entropy"],
        "gradient": flat,
        "dtypes": dtypes,
        "held": held,
        "whole": whole,
    }


def cuts(folder: Path) -> dict:
    return {size: gradients(micro_batch=size) for size in (1, 2, 3, 5)}


def bfloat16(folder: Path) -> dict:
    return gradients(dtype="bfloat16")


def bfloat16_run(folder: Path) -> dict:
    settings = config(dtype="bfloat16", output=folder / "bfloat16", updates=1)
    return report(train(settings, progress=False))


def narrow(folder: Path) -> dict:
    """Parameters and states in bfloat16, long answers; interrupted and not."""
    settings = config(dtype="pure_bfloat16", optimizer_dtype="bfloat16", long=True, save_every=0)
    whole = train(replace(settings, updates=2), progress=False)
    parts = replace(settings, output=str(folder / "narrow"), updates=1)
    train(parts, progress=False)
    resumed = train(replace(parts, updates=2), resume=True, progress=False)
    eight = outcome(lambda: train(config(optimizer_dtype="8bit"), progress=False))
    return {"whole": report(whole), "resumed": report(resumed), "8bit": eight}


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
    "two": dict(updates=3),
    "shards": dict(updates=3, shards_only=True),
    "one-then-two": dict(updates=3),
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
    again = {"whole": report(train(config(updates=3), progress=False))}
    for name, changes in GO_ON.items():
        dist.barrier()
        settings = replace(two, **changes, output=str(folder / name))
        again[name] = report(train(settings, resume=True, progress=False))
    return again


def other_weights(rank: int) -> tuple:
    """The embedded model and its tokenizer, of which rank 1 has another weight."""
    model, tokenizer = load_model(config().model, "cpu")
    with torch.no_grad():
        next(model.parameters())[0, 0] += rank
    return model, tokenizer


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
    found["settings"] = outcome(lambda: train(config(learning_rate=1e-4 * (rank + 1)), **run))
    found["prompts"] = outcome(lambda: train(config(prompts=("x" * 500, str(rank))), **run))
    found["weights"] = outcome(lambda: train(config(), *other_weights(rank), **run))
    rows = [("1 + 1 = ", "2"), ("1 + 2 = ", str(3 + rank))]
    problems = RLConfig(model=config().model, problems=rows, responses=2, group_size=2)
    found["problems"] = outcome(lambda: train(problems, **run))
    found["device"] = outcome(lambda: train(config(device="cuda:1"), **run))
    taken = config(output=folder / "taken", updates=1)
    found["first run"] = outcome(lambda: train(taken, **run))
    found["taken"] = outcome(lambda: train(taken, **run))
    blocked = config(output=folder / "blocked", updates=1)
    if rank == 0:
        (folder / "blocked").mkdir()
        (folder / "blocked" / ".checkpoint-1.tmp").write_text("in the way")
    dist.barrier()
    found["shards"] = outcome(lambda: train(blocked, **run))

    def block(line, model):
        (folder / "full" / "metrics.jsonl").unlink()
        (folder / "full" / "metrics.jsonl").mkdir()

    full = config(output=folder / "full", updates=1)
    found["metrics"] = outcome(lambda: train(full, on_step=block, **run))
    found["afterwards"] = outcome(lambda: train(config(updates=1), **run))
    return found


ON_TWO_RANKS = {
    **{name: same_run(name) for name in SAME},
    "tied and frozen": tied_and_frozen,
    "cuts": cuts,
    "bfloat16": bfloat16,
    "bfloat16 run": bfloat16_run,
    "narrow": narrow,
    "hooks": hooks,
    "resumed": resumed,
    "errors": errors,
}
if importlib.util.find_spec("peft"):
    ON_TWO_RANKS["adapters"] = adapters


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
