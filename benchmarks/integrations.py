"""Given this, do this instead: time and memory of both, for every integration.

    python -m benchmarks.integrations [--out FOLDER]

One forward and backward of each, through a two-layer Qwen2 with the vocabulary of the real ones, or
from its hidden states. Losses and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.common import environment, time_all
from em_kernels import linear_token_loss

VOCABULARY, DIM, ROWS, LENGTH = 151936, 256, 2, 128
TOLERANCE = 1e-3  # ||difference|| / ||given|| of the gradients
REPEATS = 3


class Setting(NamedTuple):
    """A model, a batch of which one half is prompt, and the same as inputs of a head."""

    model: torch.nn.Module
    batch: dict[str, Tensor]
    hidden: Tensor
    weight: Tensor
    target: Tensor


class Pair(NamedTuple):
    """What is given and what to do instead: functions to a loss with the same gradients."""

    title: str
    given: Callable[[], Tensor]
    instead: Callable[[], Tensor]
    parameters: list[Tensor]


def make_setting() -> Setting:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=DIM,
        intermediate_size=2 * DIM,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config).train()
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:, : LENGTH // 2] = -100
    hidden = torch.randn(ROWS * LENGTH, DIM, requires_grad=True)
    return Setting(
        model, dict(input_ids=ids, labels=labels), hidden, model.lm_head.weight, ids.flatten()
    )


def eager(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob, entropy, which count) from logits, as it is usually written."""
    target = labels[:, 1:]
    log_p = logits[:, :-1].float().log_softmax(-1)
    logprob = log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return logprob, -(log_p.exp() * log_p).sum(-1), target != -100


def own_forward(model, **inputs) -> Tensor:
    """The logits by the forward of the model's class, patched or not."""
    return type(model).forward(model, use_cache=False, **inputs).logits


def transformers_stats(setting: Setting) -> Pair:
    from em_kernels.integrations.transformers import apply_em_kernels

    model, batch = apply_em_kernels(setting.model), setting.batch
    ids, labels = batch["input_ids"], batch["labels"]

    def given() -> Tensor:
        logprob, entropy, counted = eager(own_forward(model, input_ids=ids), labels)
        return ((entropy - logprob) * counted).sum()

    def instead() -> Tensor:
        out = model(**batch, em_outputs=("logprob", "entropy"))
        return (out.entropy - out.logprob).sum()

    title = "transformers: log-probability and entropy of the answers"
    return Pair(title, given, instead, list(model.parameters()))


def transformers_trainer(setting: Setting) -> Pair:
    from em_kernels.integrations.transformers import entropy_loss_func

    model, ids, labels = setting.model, setting.batch["input_ids"], setting.batch["labels"]
    loss = entropy_loss_func(model)

    def given() -> Tensor:
        _, entropy, counted = eager(own_forward(model, input_ids=ids), labels)
        return (entropy * counted).sum() / counted.sum()

    title = "transformers.Trainer: entropy minimisation"
    return Pair(title, given, lambda: loss(model(ids), labels), list(model.parameters()))


def trl_head(setting: Setting) -> Pair:
    from trl.trainer.utils import add_fused_lm_head

    from em_kernels.integrations.trl import patched

    model = setting.model
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))

    def given() -> Tensor:
        out = model(**setting.batch, fused_lm_head=True)
        return (out.entropy - out.log_probs).sum()

    def instead() -> Tensor:
        with patched():
            return given()

    title = "TRL: the fused head of GRPOTrainer, RLOOTrainer and SFTTrainer"
    return Pair(title, given, instead, list(model.parameters()))


def verl_head(setting: Setting) -> Pair:
    from em_kernels.integrations.verl import linear_cross_entropy

    function = verl_function()
    _, _, *inputs = setting

    def given() -> Tensor:
        logprob, entropy = function(*inputs, 1.0, 512)
        return (entropy - logprob).sum()

    def instead() -> Tensor:
        logprob, entropy = linear_cross_entropy(*inputs)
        return (entropy - logprob).sum()

    return Pair("verl: the fused head (its torch backend)", given, instead, inputs[:2])


def verl_function() -> Callable:
    """From its file: `import verl` needs ray and more."""
    found = importlib.util.find_spec("verl")
    if found is None:
        raise ImportError("No module named 'verl'")
    folder = Path(next(iter(found.submodule_search_locations)))
    path = folder / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FusedLinearForPPOFunction.apply


def torch_cross_entropy(setting: Setting) -> Pair:
    if not hasattr(functional, "linear_cross_entropy"):
        raise ImportError("torch has no linear_cross_entropy")
    _, _, hidden, weight, target = setting
    options = torch.nn.LinearCrossEntropyOptions()
    share = torch.full(target.shape, -1 / len(target))

    def given() -> Tensor:
        return functional.linear_cross_entropy(hidden, weight, target, options=options)

    def instead() -> Tensor:
        return linear_token_loss(hidden, weight, target, logprob_weight=share).loss

    return Pair("PyTorch: linear_cross_entropy, chunked", given, instead, [hidden, weight])


# TRL's last: it patches the model for good.
PAIRS = (transformers_stats, transformers_trainer, verl_head, torch_cross_entropy, trl_head)


def measure(pair: Pair) -> dict:
    """Check the pair, then time both in interleaved rounds."""
    runs = {
        name: lambda loss=loss: (value := loss(), torch.autograd.grad(value, pair.parameters))
        for name, loss in (("given", pair.given), ("instead", pair.instead))
    }
    error = difference(runs["instead"](), runs["given"]())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{pair.title}: loss or gradients differ by {error:.1e}")
    seconds, peaks = time_all(runs, "cpu", REPEATS)
    gradients = sum(p.nbytes for p in pair.parameters)
    extra = {name: peak and max(0, peak - gradients) for name, peak in peaks.items()}
    return dict(title=pair.title, seconds=seconds, extra_bytes=extra, difference=error)


def difference(ours: tuple, theirs: tuple) -> float:
    """The larger relative difference, of the loss and of all gradients together."""
    loss = abs(ours[0] - theirs[0]) / abs(theirs[0])
    square = sum(((a - b) ** 2).sum() for a, b in zip(ours[1], theirs[1]))
    return max(loss.item(), (square / sum((b**2).sum() for b in theirs[1])).sqrt().item())


def table(rows: list[dict]) -> str:
    lines = ["| | given: time | instead | given: extra memory | instead | difference |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        time, memory = row["seconds"], row["extra_bytes"]
        cells = [f"{time[name]:.2f} s" for name in time]
        cells += ["-" if size is None else f"{size / 1e6:.0f} MB" for size in memory.values()]
        lines.append(f"| {row['title']} | {' | '.join(cells)} | {row['difference']:.0e} |")
    return "\n".join(lines)


def save(rows: list[dict], left_out: dict[str, str], folder: Path) -> None:
    facts = {**environment("cpu"), "load": os.getloadavg()[0]}
    sizes = dict(vocabulary=VOCABULARY, dim=DIM, rows=ROWS, length=LENGTH, layers=2)
    text = ", ".join(f"{name} {value}" for name, value in {**facts, **sizes}.items())
    missing = "".join(f"\n{name} is left out: {reason}\n" for name, reason in left_out.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "integrations.md").write_text(f"{__doc__}\n{text}\n\n{table(rows)}\n{missing}")
    report = {**facts, **sizes, "rows": rows, "left_out": left_out}
    (folder / "integrations.json").write_text(json.dumps(report, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmark-output"), help="folder")
    given = parser.parse_args(arguments)
    setting, rows, left_out = make_setting(), [], {}
    for make in PAIRS:
        try:
            rows.append(measure(make(setting)))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
        except ImportError as reason:
            left_out[make.__name__] = str(reason)
    save(rows, left_out, given.out)


if __name__ == "__main__":
    main()
