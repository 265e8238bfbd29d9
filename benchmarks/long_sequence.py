"""One update of entropy minimisation on one long sequence, under a cap on memory.

    python -m benchmarks.long_sequence --tokens 1024 2048 4096 --cap 16
    python -m benchmarks.long_sequence --ways long --tokens 32768 --cap 16

The model has the shape of a 0.5 B one: 896 wide, 24 layers, 14 heads and 2 of keys, an MLP of 4864,
a vocabulary of 151,936, head and embeddings tied, in bfloat16, with random weights. An update is a
forward pass, a backward pass and a step of AdamW, whose moments are there already: one on few
tokens goes before, since the backward pass of a first update has the memory of moments to itself.
Every case is a process of its own, which may allocate no more than the cap and says what it had at
most; each is saved when it is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import environment, resident
from em_kernels import linear_entropy_loss, tiny_math

FILE = "long_sequence.json"
GB = 1e9
FEW_TOKENS = 64  # of the update before
SHAPE = dict(
    vocab_size=151936,
    hidden_size=896,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    intermediate_size=4864,
    tie_word_embeddings=True,
)
SMALL = dict(
    vocab_size=65536,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=64,
    tie_word_embeddings=True,
)


@dataclass
class Case:
    """A way to make an update, on so many tokens, and the most memory it may have, bytes."""

    way: str
    tokens: int
    cap: float
    shape: dict


def make_model(case: Case):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**case.shape, max_position_embeddings=max(case.tokens, 32768))
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen2ForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def make_tokens(shape: dict, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(5, shape["vocab_size"], (1, tokens), generator=generator)


Update = Callable[[Tensor], float]
"""Of the token ids, (1, T), the loss."""


def plain(model, loss_of: Callable[[Tensor], Tensor]) -> Update:
    """An update as anybody writes it, with torch's AdamW, whose states are bfloat16 too."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)

    def update(ids: Tensor) -> float:
        loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return update


def eager(case: Case) -> Update:
    model = make_model(case)

    def loss(ids: Tensor) -> Tensor:
        logp = model(ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        return -(logp.exp() * logp).sum(-1).mean()

    return plain(model, loss)


def linear(case: Case, checkpointing: bool = False) -> Update:
    model = make_model(case)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss(ids: Tensor) -> Tensor:
        hidden = model.model(ids, use_cache=False).last_hidden_state
        return linear_entropy_loss(hidden[:, :-1], model.lm_head.weight)

    return plain(model, loss)


def checkpointing(case: Case) -> Update:
    return linear(case, checkpointing=True)


def long(case: Case, optimizer_dtype: str | None = None) -> Update:
    """What `em-kernels train --long --dtype pure_bfloat16` does with one answer of that length."""
    from em_kernels.trainer import Rollout, TrainConfig, load_model
    from em_kernels.trainer.entropy_update import EntropyUpdate, entropy_minimisation
    from em_kernels.trainer.policy_update import take_step
    from em_kernels.trainer.run import start_run

    config = TrainConfig(
        prompts=(tiny_math.PROMPT,),
        responses=1,
        loss_temperature=1.0,
        dtype="pure_bfloat16",
        optimizer_dtype=optimizer_dtype,
        long=True,
        device="cpu",
    )
    tokenizer = load_model(str(tiny_math.model_path()), "cpu")[1]
    run = start_run(config, make_model(case), tokenizer, resume=False)
    update = EntropyUpdate(run, entropy_minimisation(config))

    def one(ids: Tensor) -> float:
        attended = torch.ones_like(ids).bool()
        answer = attended.clone()
        answer[:, 0] = False
        tokens = update.weighed(Rollout(ids, attended, answer, torch.ones(1).bool()))
        return take_step(run, 1, 0, update.parts(tokens), update.loss)["loss"]

    return one


def long_8bit(case: Case) -> Update:
    return long(case, "8bit")


WAYS: dict[str, tuple[str, Callable[[Case], Update]]] = {
    "eager": ("eager PyTorch", eager),
    "linear": ("linear_entropy_loss", linear),
    "checkpointing": ("linear_entropy_loss, gradient checkpointing", checkpointing),
    "long": ("em-kernels train --long", long),
    "long-8bit": ("em-kernels train --long --optimizer-dtype 8bit", long_8bit),
}


def measure(case: Case) -> dict:
    """In this process: one update and another, its time and the most memory the process has had."""
    from transformers import Qwen2ForCausalLM  # noqa: F401  what is imported is not the update's

    limit = int(case.cap)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    masks = watch_masks()
    start = time.perf_counter()
    update = WAYS[case.way][1](case)
    update(make_tokens(case.shape, FEW_TOKENS))
    ids = make_tokens(case.shape, case.tokens)
    made, before = time.perf_counter(), resident("VmHWM")
    loss = update(ids)
    seconds = time.perf_counter() - made
    return {
        "loss": loss,
        "seconds": seconds,
        "seconds_before": made - start,
        "peak_bytes": resident("VmHWM"),
        "peak_bytes_before": before,
        "attention_masks": len(masks),
    }


def watch_masks() -> list[Tensor]:
    """Every mask that attention is called with from now on; there should be none of T x T."""
    found: list[Tensor] = []
    own = F.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **others):
        if attn_mask is not None:
            found.append(attn_mask)
        return own(*args, attn_mask=attn_mask, **others)

    F.scaled_dot_product_attention = watched
    return found


def in_process(case: Case, small: bool) -> dict:
    """The row of a case, from a process of its own; a failure is a row too."""
    command = [sys.executable, "-m", "benchmarks.long_sequence", "--one", "--ways", case.way]
    command += ["--tokens", str(case.tokens), "--cap", str(case.cap / GB)] + ["--small"] * small
    done = subprocess.run(command, capture_output=True, text=True)
    found: dict = {"failure": None}
    if done.returncode == 0:
        found |= json.loads(done.stdout.splitlines()[-1])
    else:
        found["failure"] = why(done)
    return {"way": case.way, "tokens": case.tokens, "cap": case.cap, **found}


# What the allocators say, and the loader of a library that a first call loads.
NO_MEMORY = ("memory", "failed to map segment")


def why(done: subprocess.CompletedProcess) -> str:
    said = done.stderr.strip().splitlines()[-1:] or [""]
    if done.returncode == -9 or any(word in said[0].lower() for word in NO_MEMORY):
        return "out of memory"
    return f"exit {done.returncode}: {said[0][:200]}"


def save(path: Path, row: dict, facts: dict) -> None:
    """Among those of before: a case measured again takes the place of the last one."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    place = {(r["way"], r["tokens"], r["cap"]): r for r in rows}
    place[row["way"], row["tokens"], row["cap"]] = {**row, **facts}
    ordered = sorted(place.values(), key=lambda r: (list(WAYS).index(r["way"]), r["tokens"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"shape": SHAPE, "rows": ordered}, indent=1) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.long_sequence", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--cap", type=float, default=16, help="GB (1e9 bytes) a case may have")
    parser.add_argument("--out", default="benchmark-output", help="folder of the rows")
    parser.add_argument("--small", action="store_true", help="a model of 2 M, to try it")
    parser.add_argument("--one", action="store_true", help="in this process; prints the row")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    shape = SMALL if options.small else SHAPE
    cases = [Case(w, t, options.cap * GB, shape) for t in options.tokens for w in options.ways]
    if options.one:
        print(json.dumps(measure(cases[0])))
        return
    path, facts = Path(options.out) / FILE, environment("cpu")
    for case in cases:
        row = in_process(case, options.small)
        save(path, row, facts)
        peak = row["failure"] or f"{row['peak_bytes'] / GB:.1f} GB, {row['seconds']:.0f} s"
        print(f"{case.way}, {case.tokens} tokens: {peak}", flush=True)


if __name__ == "__main__":
    main()
