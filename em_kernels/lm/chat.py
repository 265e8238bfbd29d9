"""How a prompt is put to a model: the turns of a chat, through the template of its tokenizer."""

from __future__ import annotations

import inspect
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from em_kernels.lm.data import check_text, check_unicode, not_unicode
from em_kernels.lm.optional import require
from em_kernels.lm.text import did_you_mean, one_line

SYSTEM = (
    "the system turn before every prompt, of those that are chats before the ones without one; "
    "for a tokenizer with a chat template"
)
TEMPLATE_KWARGS = (
    "what the tokenizer's chat template reads besides the turns, as enable_thinking=false; values "
    "are JSON, else text; or one JSON object; what the template does not read is refused"
)
MESSAGES = "messages"
"""The field of a row that holds a chat."""


class Turn(NamedTuple):
    """One message of a chat; `role` is "system", "user", "assistant", ..."""

    role: str
    content: str


Prompt = str | tuple[Turn, ...]
"""The user's turn, or the turns of a chat."""


@dataclass(frozen=True)
class Chat:
    """What goes to the model besides the prompt.

    Args:
        system: the system turn of chats that bring none.
        template_kwargs: given to the chat template by name.
    """

    system: str | None = None
    template_kwargs: Mapping[str, Any] | None = None

    def turns(self, prompt: Prompt) -> tuple[Turn, ...]:
        turns = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
        if self.system is None or turns[0].role == "system":
            return turns
        return (Turn("system", self.system), *turns)


PLAIN = Chat()


class WithChat:
    """Of settings that say what goes to the model with every prompt."""

    system: str | None
    chat_template_kwargs: Mapping[str, Any] | None

    @property
    def chat(self) -> Chat:
        return Chat(self.system, self.chat_template_kwargs)


def encode_prompt(tokenizer, prompt: Prompt, chat: Chat = PLAIN) -> list[int]:
    """Token ids of the prompt through the chat template, ready for an answer.

    A tokenizer without a chat template encodes the bare text, as it does by itself: with the token
    that it begins texts with, if it has one. A template writes that token itself, once.

    Raises:
        ImportError: a chat template without jinja2.
        ValueError: not one token; several turns, a system turn or `template_kwargs` for a
            tokenizer without a chat template; a template that refuses the turns, or does not read
            one of the `template_kwargs`.
    """
    if isinstance(prompt, str):
        check_text("prompt", prompt)
    turns = chat.turns(prompt)
    if tokenizer.chat_template:
        text = _through_template(tokenizer, turns, chat.template_kwargs or {})
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        _check_bare(turns, chat)
        ids = tokenizer(turns[0].content)["input_ids"]
    if not ids:
        raise ValueError(
            f"prompt must have at least one token, got none from {turns[-1].content!r}"
        )
    return list(ids)


def _check_bare(turns: Sequence[Turn], chat: Chat) -> None:
    remedy = "give the tokenizer a chat_template, or put the text into `template`"
    if chat.template_kwargs:
        raise ValueError(
            "chat_template_kwargs are for a tokenizer with a chat template, this one has none: "
            "leave them out"
        )
    if chat.system is not None:
        raise ValueError(
            "system must be left out with a tokenizer without a chat template, got "
            f"{chat.system[:60]!r}: {remedy}"
        )
    if len(turns) > 1:
        raise ValueError(
            f"prompt must be one text for a tokenizer without a chat template, got {len(turns)} "
            f"turns: {remedy}"
        )


def _through_template(tokenizer, turns: Sequence[Turn], values: Mapping[str, Any]) -> str:
    require("jinja2", "em-kernels[train]")
    if values:
        _check_read(tokenizer, values)
    messages = [turn._asdict() for turn in turns]
    options = {**values, "tokenize": False, "add_generation_prompt": True}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except ImportError:
        raise
    except Exception as error:  # of Jinja, or of Python inside the template
        roles = ", ".join(turn.role for turn in turns)
        remedy = "one that wants a system turn is given it by `system`"
        if turns[0].role == "system":
            remedy = "one that takes no system turn wants its text in `template` instead"
        raise ValueError(
            f"the tokenizer's chat template refuses a chat of {roles}: {one_line(error)}; {remedy}"
        ) from error


def _check_read(tokenizer, values: Mapping[str, Any]) -> None:
    reads = template_names(tokenizer.get_chat_template())
    for name in values:
        if name not in reads:
            near = did_you_mean(name, reads)
            besides = ", ".join(map(repr, sorted(reads))) or "nothing"
            raise ValueError(
                f"chat_template_kwargs: {name!r} is not read by the tokenizer's chat template, "
                f"which reads {besides} besides the messages{near}; leave it out"
            )


@cache
def template_names(template: str) -> frozenset[str]:
    """What a chat template reads that a user may give: not the turns and the special tokens."""
    jinja2, meta = require("jinja2", "em-kernels[train]"), require("jinja2.meta", "jinja2")
    plain = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", template)  # transformers' own marks
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    found = meta.find_undeclared_variables(environment.parse(plain))
    return frozenset(name for name in found if name not in _given() and name[-6:] != "_token")


@cache
def _given() -> frozenset[str]:
    """What `apply_chat_template` gives a template by itself, or takes by these names."""
    tokenizer = require("transformers", "em-kernels[train]").PreTrainedTokenizerBase
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    return frozenset(own | {"messages", "raise_exception", "strftime_now"})


def warn_without_template(tokenizer, ids: Sequence[int]) -> None:
    """Say what is sent, where there is no chat template; `ids` are of the first prompt."""
    if tokenizer.chat_template:
        return
    text = tokenizer.decode(list(ids)[:20])
    warnings.warn(
        "the tokenizer has no chat template: prompts are sent as bare text, without marks of turns,"
        f" beginning with {text!r}; for a model that was tuned on chats give it a chat_template",
        stacklevel=3,
    )


def turns_of(name: str, value: Any) -> tuple[Turn, ...]:
    """A chat, of mappings or (role, content) pairs; ValueError that names it."""
    turns = []
    for turn in value if isinstance(value, (list, tuple)) else [value]:
        pair = isinstance(turn, (list, tuple)) and len(turn) == 2
        role, content = turn if pair else (None, None)
        if isinstance(turn, Mapping):
            role, content = turn.get("role"), turn.get("content")
        if not (isinstance(role, str) and isinstance(content, str) and content.strip()):
            raise ValueError(
                f'{name!r} must be turns {{"role": ..., "content": text}}, got {reprlib.repr(turn)}'
            )
        check_unicode(f"{name!r}", content)
        turns.append(Turn(role, content))
    if not turns:
        raise ValueError(f"{name!r} must have a turn, got none")
    return tuple(turns)


def check_prompts(name: str, value: Any) -> tuple[Prompt, ...]:
    """One prompt or several: texts, or chats as lists of turns."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise TypeError(f"{name} must be one text or several, got {value!r}")
    return tuple(turns_of(name, v) if isinstance(v, (list, tuple)) else v for v in value)


def check_system(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {value!r}")
    if not value.strip() or not_unicode(value):
        check_text(name, value)
    return value
