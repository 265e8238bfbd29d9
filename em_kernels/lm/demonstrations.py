"""Demonstrations: prompts with what a model is to answer, from rows of problems or of chats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from em_kernels.lm.chat import MESSAGES, PLAIN, Chat, Turn, encode_prompt, turns_of
from em_kernels.lm.data import fields_of, text_field
from em_kernels.lm.problems import Source, row_error, rows_of
from em_kernels.lm.rollout import (
    Rollout,
    end_tokens,
    join_answers,
    left_pad,
    pad_token,
    room_for_answers,
)

SOLUTIONS = ("solution", "completion", "response", "answer")
"""The fields of a worked solution, the first of which a row has is taken."""
FIELD = "solution_field"


class Demonstration(NamedTuple):
    """What was said, and what the model is to say then."""

    turns: tuple[Turn, ...]
    completion: str


def load_demonstrations(
    source: Source, fields: Sequence[str] = SOLUTIONS
) -> tuple[Demonstration, ...]:
    """Of every row: a problem, put to the model by the template, and its worked solution.

    Args:
        source: where the rows are, and their fields of problems.
        fields: those of the solution. A row may have the chat `messages` in place of the two, whose
            last turn is the demonstration and the assistant's, and prompt and completion may be
            such lists too, as TRL writes them. A chat is not put into the template.

    Raises:
        FileNotFoundError, ImportError: as `load_problems`.
        ValueError: no row, or one that is no demonstration, by its number.
    """
    found: list[Demonstration] = []
    noun, rows = rows_of(source)
    for number, row in rows:
        try:
            found.append(_demonstration(row, source, fields))
        except ValueError as error:
            raise row_error(source, noun, number, error) from None
    if not found:
        raise ValueError(f"{source.path}: no demonstrations in it")
    return tuple(found)


def demonstration(prompt: str, completion: str) -> Demonstration:
    """The answer to one turn of the user."""
    return Demonstration((Turn("user", prompt),), completion)


class EncodedDemonstrations:
    """Demonstrations as the token ids of a model: what it would read, and what it would draw.

    A completion ends with the token that ends answers (the tokenizer's, if it is one of the
    model's), and is cut where the answers of a run are: at `max_new_tokens` tokens, or at the
    positions that the longest prompt leaves. `cut` counts those that were, at `room` tokens.

    Raises:
        ValueError: a chat for a tokenizer without a template, a prompt that leaves no position, a
            completion without a token.
    """

    def __init__(
        self,
        model,
        tokenizer,
        demonstrations: Sequence[Demonstration],
        max_new_tokens: int,
        chat: Chat = PLAIN,
    ):
        self.ends = end_tokens(model, tokenizer)
        self.filler = pad_token(tokenizer, self.ends)
        self.device = model.device
        self.prompts = [encode_prompt(tokenizer, one.turns, chat) for one in demonstrations]
        room = room_for_answers(model, max(map(len, self.prompts)), max_new_tokens)
        texts = [one.completion for one in demonstrations]
        whole = [self._completion(tokenizer, text) for text in texts]
        self.completions = [ids[:room] for ids in whole]
        self.room, self.cut = room, sum(len(ids) > room for ids in whole)

    def _completion(self, tokenizer, text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"solution must have at least one token, got none from {text!r}")
        own = tokenizer.eos_token_id
        return [*ids, *([own] if own in self.ends else self.ends[:1])]

    def __len__(self) -> int:
        return len(self.prompts)

    def rollout(self, numbers: Sequence[int]) -> Rollout:
        """Those of the numbers, as if the model had drawn them."""
        ids, mask = left_pad([self.prompts[number] for number in numbers], self.filler)
        answers = [torch.tensor([self.completions[number]]) for number in numbers]
        return join_answers(ids, mask, answers, self.ends, self.filler).to(self.device)


def _demonstration(row: Mapping | str, source: Source, fields: Sequence[str]) -> Demonstration:
    """ValueError: why the row holds none."""
    if isinstance(row, str):
        raise ValueError(row)
    names = [name for name in fields_of(row, source.problem) if row[name] is not None]
    if not names and row.get(MESSAGES) is not None:
        return _split(turns_of(MESSAGES, row[MESSAGES]), MESSAGES)
    if names and isinstance(row[names[0]], (list, tuple)):
        told = turns_of(names[0], row[names[0]])
        known = (name for name in fields_of(row, fields) if row[name] is not None)
        name = next(known, fields[0])
        answer = row.get(name)
        if isinstance(answer, (list, tuple)):
            return _split((*told, *turns_of(name, answer)), name)
        return Demonstration(told, text_field(row, *fields, setting=FIELD))
    prompt = source.prompt(text_field(row, *source.problem, setting="problem_field"))
    return demonstration(prompt, text_field(row, *fields, setting=FIELD))


def _split(turns: tuple[Turn, ...], name: str) -> Demonstration:
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise ValueError(f"{name!r} must end with a turn of the assistant, after one that asks")
    return Demonstration(turns[:-1], turns[-1].content)
