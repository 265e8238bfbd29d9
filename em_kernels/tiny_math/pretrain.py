"""Train the embedded model from random weights.

    python -m em_kernels.tiny_math.pretrain --out DIR [--recipe habits]

Phase 1 teaches arithmetic: clean solutions alternate with batches of bare equations. Phase 2 is
short and makes the model "capable but diffuse": its text comes from a mixture of careful, sloppy
and direct writers, so that samples are often wrong where the most likely answer is right. With
--recipe habits the mixture depends on whom the problem is about, and for most of them the likeliest
writer guesses or does not stop at the answer: there the most likely answer is wrong too, by habit.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from em_kernels.evaluator import evaluate
from em_kernels.tiny_math import MAX_NEW_TOKENS
from em_kernels.tiny_math.problems import (
    NAMES,
    WRITERS,
    Problem,
    draw_equation,
    make_problems,
    stream,
    write_solution,
)
from em_kernels.tiny_math.tokenizer import ASSISTANT, BOS, USER, build_tokenizer

# A piece of text and whether the loss counts its tokens.
Segment = tuple[str, bool]

EQUATIONS_PER_DRILL = 8
IGNORED = -100


Entry = TypeVar("Entry")


def _by_name(problem: str, entries: Sequence[Entry]) -> Entry:
    """Of a problem about NAMES[i] the entry i, counted round."""
    return entries[NAMES.index(problem.split()[0]) % len(entries)]


@dataclass(frozen=True)
class Recipe:
    """Steps, batch sizes and peak learning rates of both phases, and the writers of phase 2.

    Phase 1 may have several cycles, each with its own warm-up and decay of the learning rate.
    `shares` and `slips` are the share of the text and the slip rate of each of WRITERS. There may
    be several rows of shares: of a problem about NAMES[i] row i holds, counted round.
    """

    arithmetic_steps: tuple[int, ...] = (2000, 900)
    mixture_steps: int = 800
    batch: tuple[int, int] = (48, 32)
    peak_lr: tuple[float, float] = (2e-3, 8e-4)
    shares: tuple[tuple[float, ...], ...] = ((0.40, 0.42, 0.18, 0.0),)
    slips: tuple[float, ...] = (0.03, 0.40, 0.0, 0.0)
    seed: int = 0

    def shares_of(self, problem: Problem) -> tuple[float, ...]:
        """Of the writers of a problem's solutions."""
        return _by_name(problem.text, self.shares)


HABITS = {
    "tidy": (0.52, 0.24, 0.12, 0.12),
    "restless": (0.24, 0.18, 0.20, 0.38),
    "hasty": (0.22, 0.18, 0.44, 0.16),
}
_HABIT_OF_NAME = ("tidy", "restless", "hasty", "restless", "tidy")
RECIPES = {
    "plain": Recipe(),
    "habits": Recipe(
        shares=tuple(HABITS[habit] for habit in _HABIT_OF_NAME), slips=(0.03, 0.40, 0.0, 0.03)
    ),
}


def habit_of(problem: str) -> str:
    """How the model of the recipe "habits" answers this problem: a key of HABITS."""
    return _by_name(problem, _HABIT_OF_NAME)


def build_model(vocab_size: int, tokenizer) -> Qwen2ForCausalLM:
    """Qwen2, hidden 128, 3 layers, 4 heads (2 for keys and values), about 0.6 M parameters."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
    )
    return model


def _stream_seed(recipe: Recipe, cycle: int) -> int:
    return 1000 * recipe.seed + cycle


def drill(rng: random.Random) -> list[Segment]:
    """A turn of bare equations in which only the results count."""
    segments = [(f"{BOS}{USER}?{ASSISTANT}", False)]
    for _ in range(EQUATIONS_PER_DRILL):
        question, result = draw_equation(rng)
        segments += [(question, False), (f"{result}\n", True)]
    return segments


def worked(problem, writer: str, slip_rate: float, rng: random.Random, eos: str) -> list[Segment]:
    """A problem as a user turn, which does not count, and one writer's solution, which does."""
    solution = write_solution(problem, writer, slip_rate, rng)
    return [(f"{BOS}{USER}{problem.text}{ASSISTANT}", False), (solution + eos, True)]


def collate(tokenizer, examples: list[list[Segment]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids and labels, both (B, L); labels are IGNORED where no loss counts."""
    flat = [text for example in examples for text, _ in example]
    encoded = iter(tokenizer(flat, add_special_tokens=False)["input_ids"])
    ids, labels = [], []
    for example in examples:
        pieces = [(next(encoded), counts) for _, counts in example]
        ids.append([t for tokens, _ in pieces for t in tokens])
        labels.append([t if counts else IGNORED for tokens, counts in pieces for t in tokens])
    length = max(map(len, ids))
    pad = tokenizer.pad_token_id
    return (
        torch.tensor([row + [pad] * (length - len(row)) for row in ids]),
        torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
    )


def arithmetic_batches(tokenizer, recipe: Recipe, cycle: int = 0):
    """Endless batches of phase 1: drills and clean solutions in turn."""
    label = f"phase 1, {recipe.seed}"
    rng = random.Random(f"{label}, {cycle}" if cycle else label)
    source = stream("pretrain", _stream_seed(recipe, cycle))
    size, eos = recipe.batch[0], tokenizer.eos_token
    while True:
        yield collate(tokenizer, [drill(rng) for _ in range(size)])
        yield collate(
            tokenizer, [worked(next(source), "careful", 0.0, rng, eos) for _ in range(size)]
        )


def mixture_batches(tokenizer, recipe: Recipe):
    """Endless batches of phase 2: every problem by a writer drawn from its shares."""
    rng = random.Random(f"phase 2, {recipe.seed}")
    source = stream("pretrain", _stream_seed(recipe, len(recipe.arithmetic_steps)))
    slip_rate = dict(zip(WRITERS, recipe.slips, strict=True))
    while True:
        problems = list(islice(source, recipe.batch[1]))
        writers = [rng.choices(WRITERS, recipe.shares_of(problem))[0] for problem in problems]
        yield collate(
            tokenizer,
            [
                worked(problem, writer, slip_rate[writer], rng, tokenizer.eos_token)
                for problem, writer in zip(problems, writers)
            ],
        )


def rate_at(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model, batches, steps: int, peak_lr: float, title: str) -> None:
    """Minimise the token-mean cross-entropy of the labels over `steps` batches, in place."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc=title, mininterval=2.0)
    for step in bar:
        ids, labels = next(batches)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.param_groups[0]["lr"] = rate_at(step, steps, peak_lr)
        optimiser.step()
        optimiser.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def after_arithmetic(recipe: Recipe, tokenizer, folder: Path | None) -> Qwen2ForCausalLM:
    """The model after phase 1: read from `folder` if it is there, else trained and saved there."""
    if folder is not None and folder.exists():
        return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = build_model(len(tokenizer), tokenizer)
    for cycle, steps in enumerate(recipe.arithmetic_steps):
        batches = arithmetic_batches(tokenizer, recipe, cycle)
        train(model, batches, steps, recipe.peak_lr[0], f"arithmetic {cycle + 1}")
    if folder is not None:
        save(model, tokenizer, folder)
    return model


def pretrain(recipe: Recipe, out: Path, phase1: Path | None = None) -> None:
    """Train both phases, save to `out`, print dev accuracy; `phase1` as in `after_arithmetic`."""
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = after_arithmetic(recipe, tokenizer, phase1)
    batches = mixture_batches(tokenizer, recipe)
    train(model, batches, recipe.mixture_steps, recipe.peak_lr[1], "mixture")
    save(model, tokenizer, out)
    report(model, tokenizer)


def save(model, tokenizer, out: Path) -> None:
    """Write weights, configurations and tokenizer as `from_pretrained` reads them."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def report(model, tokenizer, count: int = 1000) -> None:
    """Print greedy and sampled accuracy on dev problems."""
    problems = [(p.text, str(p.answer)) for p in make_problems("dev", count)]
    for temperature in (0.5, 1.0):
        result = evaluate(
            model,
            tokenizer,
            problems,
            temperature=temperature,
            greedy=temperature == 1.0,
            max_new_tokens=MAX_NEW_TOKENS,
            judge="exact",
        )
        print(f"dev accuracy at temperature {temperature}: {result.sampled_accuracy:.3f}")
    print(f"dev accuracy, greedy: {result.greedy_accuracy:.3f} ({count} problems each)")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    writers = f"of the writers {', '.join(WRITERS)}; the recipe's unless given"
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--phase1", type=Path, help="model after phase 1: read if there, else kept")
    parser.add_argument("--recipe", choices=RECIPES, default="plain")
    parser.add_argument("--arithmetic-steps", type=int, nargs="+")
    parser.add_argument("--mixture-steps", type=int)
    parser.add_argument("--shares", type=float, nargs=len(WRITERS), metavar="SHARE", help=writers)
    parser.add_argument("--slips", type=float, nargs=len(WRITERS), metavar="RATE", help=writers)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    own = {
        "arithmetic_steps": given.arithmetic_steps and tuple(given.arithmetic_steps),
        "mixture_steps": given.mixture_steps,
        "shares": given.shares and (tuple(given.shares),),
        "slips": given.slips and tuple(given.slips),
        "seed": given.seed,
    }
    chosen = {name: value for name, value in own.items() if value is not None}
    recipe = replace(RECIPES[given.recipe], **chosen)
    began = time.perf_counter()
    pretrain(recipe, given.out, given.phase1)
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
