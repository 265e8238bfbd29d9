"""Accuracy of a causal language model on word problems, greedy or sampled."""

from __future__ import annotations

import re

import torch

from em_kernels.tiny_math.problems import Problem

MAX_NEW_TOKENS = 64

_ANSWER = re.compile(r"####\s*(\d+)")


def final_answer(text: str) -> str | None:
    """The number after the last "####" of a solution, or None."""
    found = _ANSWER.findall(text)
    return found[-1] if found else None


@torch.no_grad()
def sample(
    model, tokenizer, prompts: list[str], temperature: float, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[str]:
    """One response per prompt, each prompt a user turn; temperature 0 decodes greedily."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    drawing = {"do_sample": False}
    if temperature > 0:
        drawing = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        **drawing,
    )
    return tokenizer.batch_decode(
        tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def accuracy(
    model,
    tokenizer,
    problems: list[Problem],
    temperature: float,
    seed: int = 0,
    batch_size: int = 512,
) -> float:
    """Share of problems answered right, one response each. Seeds torch's global generator."""
    if not problems:
        raise ValueError("problems must not be empty")
    torch.manual_seed(seed)
    right = 0
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        responses = sample(model, tokenizer, [p.text for p in batch], temperature)
        answers = [final_answer(response) for response in responses]
        right += sum(a == str(p.answer) for a, p in zip(answers, batch, strict=True))
    return right / len(problems)
