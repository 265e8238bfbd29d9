"""The texts an analysis reads: answers of an evaluation, or a file of given ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from em_kernels.analysis.tables import temperature
from em_kernels.evaluator.records import SETTINGS, Answer, read_settings
from em_kernels.evaluator.summary import records_of
from em_kernels.lm.chat import PLAIN, Chat, encode_prompt
from em_kernels.lm.data import fill_template, json_rows, not_unicode
from em_kernels.lm.settings import check_int
from em_kernels.lm.text import text_digest


class Text(NamedTuple):
    """Token ids of a prompt and of what followed it; `key` tells which text of the source it is."""

    key: str
    prompt: list[int]
    answer: list[int]

    @property
    def digest(self) -> str:
        """Tells texts of the same key apart."""
        return text_digest(repr((self.prompt, self.answer)))


class Texts:
    """Streams the texts of a source, and counts in `left_out` those that cannot be used.

    Args:
        source: a folder of `run_eval`, whose answers are taken as the tokens they were; or JSON
            lines with "response" (or "text") and perhaps "prompt".
        tokenizer: for prompts, and for answers that are only there as text.
        longest: the most tokens of a text; None is no limit.
        limit: only the first so many.
        drawn_at: only answers of an evaluation at this temperature.

    Raises:
        FileNotFoundError, ValueError: no such source.
    """

    def __init__(
        self,
        source: str | Path,
        tokenizer,
        longest: int | None = None,
        limit: int | None = None,
        drawn_at: float | None = None,
        chat: Chat = PLAIN,
    ):
        if limit is not None:
            check_int("limit", limit, 1)
        self.source, self.tokenizer = Path(source), tokenizer
        self.longest, self.limit, self.drawn_at = longest, limit, drawn_at
        self.chat = chat
        self.left_out: Counter[str] = Counter()
        self.is_evaluation = (self.source / SETTINGS).is_file()
        if not self.is_evaluation and not self.source.is_file():
            raise FileNotFoundError(f"no evaluation and no file of texts: {source}")

    def __iter__(self) -> Iterator[Text]:
        self.left_out.clear()
        found = self._answers() if self.is_evaluation else self._lines()
        count = 0
        for text in found:
            if count == self.limit:
                return
            reason = self._unusable(text)
            if reason:
                self.left_out[reason] += 1
                continue
            count += 1
            yield text

    @property
    def why_none(self) -> str:
        """In words, where a read has given none."""
        told = [f"{number} left out: {reason}" for reason, number in self.left_out.items()]
        at = "" if self.drawn_at is None else f" at {temperature(self.drawn_at)}"
        return "; ".join(told) or f"it has none{at}"

    def _unusable(self, text: Text) -> str | None:
        if not text.answer:
            return "no tokens in the answer"
        if self.longest is not None and len(text.prompt) + len(text.answer) > self.longest:
            return "too long for the model"
        return None if text.prompt or len(text.answer) > 1 else "one token and no prompt"

    def _answers(self) -> Iterator[Text]:
        settings = read_settings(self.source)
        config = settings["config"]
        template, chat = config["template"], _chat_of(config)
        prompts: dict[int, list[int]] = {}
        checked, records = False, records_of(self.source, settings)
        for record in records:
            if record.answer.ids and not checked:
                self._check_tokenizer(record.answer)
                checked = True
            i = record.problem
            if i not in prompts:
                prompt = fill_template(template, settings["problems"][i]["problem"])
                prompts = {i: encode_prompt(self.tokenizer, prompt, chat)}
            if self.drawn_at not in (None, record.temperature):
                continue
            key = f"problem {i}, {temperature(record.temperature)}, sample {record.sample}"
            yield Text(key, prompts[i], record.answer.ids or [])
        self.left_out.update(records.left_out)

    def _check_tokenizer(self, answer: Answer) -> None:
        if self.tokenizer.decode(answer.ids, skip_special_tokens=True) != answer.text:
            raise ValueError(f"the answers of {self.source} are of a model with other tokens")

    def _lines(self) -> Iterator[Text]:
        for number, row in json_rows(self.source):
            text = self._text(number, row) if isinstance(row, dict) else row
            if isinstance(text, str):
                self.left_out[text] += 1
            else:
                yield text

    def _text(self, number: int, row: dict) -> Text | str:
        """What a row holds, or why it holds none."""
        answer = next((row[name] for name in ("response", "text") if name in row), None)
        prompt = row.get("prompt")
        if not isinstance(answer, str) or not isinstance(prompt, (str, type(None))):
            return "no text in 'response' or 'text'"
        if not_unicode(answer) or not_unicode(prompt or ""):
            return "half of a surrogate pair"
        before = []
        if prompt and prompt.strip():
            before = encode_prompt(self.tokenizer, prompt, self.chat)
        return Text(
            f"line {number}", before, self.tokenizer(answer, add_special_tokens=False).input_ids
        )


def _chat_of(config: Mapping[str, Any]) -> Chat:
    """Of an evaluation, which may be of before there were these settings."""
    return Chat(config.get("system"), config.get("chat_template_kwargs"))
