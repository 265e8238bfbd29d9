"""A whole evaluation: every problem, several times, at several temperatures, on disk as it goes.

The folder of an evaluation holds eval.json (the settings, the problems, what was left out),
records.jsonl (one line an answer) and summary.json. A stopped evaluation goes on where it was: each
answer is drawn from its own seed, so they are those of an uninterrupted one.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from em_kernels.evaluator.asking import (
    Asked,
    Plan,
    ask_all,
    default_batch_size,
    longest_prompt,
    weights_digest,
)
from em_kernels.evaluator.records import (
    ELSEWHERE,
    RECORDS,
    SETTINGS,
    SUMMARY,
    VERSION,
    EvalError,
    Records,
    mark,
    read_settings,
    write_json,
)
from em_kernels.evaluator.statistics import require_scipy
from em_kernels.evaluator.summary import summarise
from em_kernels.lm.chat import (
    SYSTEM,
    TEMPLATE_KWARGS,
    WithChat,
    check_system,
    encode_prompt,
    warn_without_template,
)
from em_kernels.lm.data import read_json_object
from em_kernels.lm.heads import Head, ModelError, read_head
from em_kernels.lm.judge.judges import JUDGES, judge_name, make_judge
from em_kernels.lm.lock import LOCK, held
from em_kernels.lm.models import (
    DTYPES,
    REMOTE_CODE,
    check_causal,
    load_model,
)
from em_kernels.lm.problems import (
    ANSWER_FIELD,
    FIELD_SHOWN,
    FILES,
    PROBLEM_FIELD,
    SPLIT,
    TEMPLATE,
    TEMPLATE_SHOWN,
    Problems,
    Source,
    find_source,
    find_template,
    load_problems,
)
from em_kernels.lm.rollout import cut_message, end_tokens
from em_kernels.lm.settings import (
    at_least,
    check_settings,
    device_text,
    documented,
    fraction,
    key_values,
    not_negative,
    path_text,
    setting,
)
from em_kernels.lm.text import repair_lines
from em_kernels.lm.weights import check_not_nan

USUAL: dict[str, Any] = {"samples": 1, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 2048}
"""Of the generation, where neither the caller nor the preset says anything."""


def _temperatures(name: str, values) -> tuple[float, ...]:
    several = [values] if isinstance(values, (int, float)) else values
    if isinstance(several, (str, bytes)) or not isinstance(several, Iterable):
        raise TypeError(f"{name} must be numbers, got {values!r}")
    try:
        values = tuple(float(value) for value in several)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name} must be numbers, got {values!r}") from None
    if not values:
        raise ValueError(
            f"{name} must have one at least, got none: --no-greedy leaves out 0, and no other is "
            "given"
        )
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ValueError(f"{name} must be different numbers, {twice:g} is there twice")
    return tuple(not_negative(name, value) for value in values)


@documented
@dataclass(frozen=True)
class EvalConfig(WithChat):
    """Everything that decides what an evaluation does."""

    model: str = setting(MISSING, "a model folder or a hub name", check=path_text)
    problems: str = setting(MISSING, FILES, check=path_text, metavar="FILE|PRESET")
    output: str = setting(
        MISSING, "folder of the evaluation; it goes on if stopped", check=path_text, metavar="DIR"
    )
    samples: int | None = setting(
        None,
        "answers to each problem at each temperature above 0",
        check=at_least(1),
        shown="the preset's, else 1",
    )
    temperatures: tuple[float, ...] | None = setting(
        None,
        "of the sampling; 0 takes the likeliest token each time, once",
        check=_temperatures,
        metavar="T",
        shown="0 and the preset's, else 0 and 1",
    )
    top_p: float | None = setting(
        None, "nucleus of the sampling", check=fraction, shown="the preset's, else 1"
    )
    max_new_tokens: int | None = setting(
        None, "longest answer", check=at_least(1), shown="the preset's, else 2048"
    )
    batch_size: int | None = setting(
        None,
        "answers generated at once",
        check=at_least(1),
        shown="256 of a small model, else 64 on a GPU and 8 on a CPU",
    )
    judge: str = setting("auto", "what decides whether an answer is right", choices=JUDGES)
    template: str | None = setting(None, TEMPLATE, shown=TEMPLATE_SHOWN)
    problem_field: str | None = setting(None, PROBLEM_FIELD, shown=FIELD_SHOWN)
    answer_field: str | None = setting(None, ANSWER_FIELD, shown=FIELD_SHOWN)
    split: str | None = setting(None, SPLIT, shown="the preset's, else test")
    limit: int | None = setting(
        None, "only the first so many problems", check=at_least(1), shown="all"
    )
    labelled: bool = setting(
        True,
        "the problems have answers; without, every answer counts as wrong",
        no_flag="select has --unlabelled",
    )
    dtype: str = setting("float32", "of the model", choices=DTYPES)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", check=device_text)
    seed: int = setting(0, "of the sampling", check=at_least(0))
    trust_remote_code: bool = setting(False, REMOTE_CODE)
    system: str | None = setting(None, SYSTEM, check=check_system, metavar="TEXT")
    chat_template_kwargs: Mapping[str, Any] | None = setting(
        None, TEMPLATE_KWARGS, check=key_values, metavar="KEY=VALUE"
    )

    def __post_init__(self):
        check_settings(self)
        if self.template is not None:
            find_template(self.template)
        if self.answer_field is not None and not self.labelled:
            raise ValueError(
                f"answer_field is for problems with answers, got {self.answer_field!r} for "
                "problems without: leave it out"
            )

    @property
    def source(self) -> Source:
        """Where the problems lie, and how they are put."""
        found = find_source(
            self.problems,
            template=self.template,
            problem_field=self.problem_field,
            answer_field=self.answer_field,
            split=self.split,
        )
        return found if self.labelled else replace(found, answer=())

    @property
    def plan(self) -> Plan:
        """Of a filled config."""
        return Plan._make(getattr(self, name) for name in Plan._fields)

    def filled(self, batch_size: int) -> EvalConfig:
        """With what was left open taken from the source and the model, and the judge by name."""
        source, usual = self.source, dict(USUAL)
        usual |= source.settings
        usual["temperatures"] = (0.0, float(usual.pop("temperature")))
        usual["batch_size"] = batch_size
        left_open = {n: value for n, value in usual.items() if getattr(self, n) is None}
        judge = judge_name(make_judge(self.judge))
        return replace(self, template=source.template, judge=judge, **left_open)


def run_eval(config: EvalConfig, *, model=None, tokenizer=None, progress: bool = True) -> dict:
    """Ask and judge whatever the folder does not have yet; returns the summary, see `summarise`.

    Args:
        config: see `EvalConfig`.
        model, tokenizer: in place of loading `config.model`.
        progress: show a bar.

    Raises:
        EvalError: the folder holds an evaluation with other settings.
        InUseError: another process evaluates into the folder.
        FileNotFoundError, ImportError, ValueError: of the problems or the model.
    """
    require_scipy()
    with held(config.output, "an evaluation"):
        return _run_eval(config, model, tokenizer, progress)


def _run_eval(config: EvalConfig, model, tokenizer, progress: bool) -> dict:
    loaded = load_problems(config.source, config.limit)
    judge = make_judge(config.judge) if config.labelled else lambda response, answer: False
    if model is None:
        dtype, trust = getattr(torch, config.dtype), config.trust_remote_code
        model, tokenizer = load_model(config.model, config.device, dtype, trust)
    check_not_nan(model)
    config = config.filled(config.batch_size or default_batch_size(model))
    asked = [loaded.source.prompt(problem.problem) for problem in loaded.problems]
    prompts = [encode_prompt(tokenizer, prompt, config.chat) for prompt in asked]
    warn_without_template(tokenizer, prompts[0])
    limit = longest_prompt(model)
    too_long = [i for i, ids in enumerate(prompts) if limit is not None and len(ids) > limit]
    folder = Path(config.output)
    found = {"too_long": too_long, "weights": weights_digest(model)}
    settings = _open(folder, config, loaded, found)
    marked = cache(partial(mark, settings))
    records = Records(folder / RECORDS, settings)
    batches = ask_all(
        Asked(model, tokenizer, judge, _head(model, prompts)),
        config.plan,
        loaded.problems,
        prompts,
        config.seed,
        done={record.key for record in records},
        too_long=set(too_long),
        progress=progress,
    )
    for batch in batches:
        records.add([replace(record, of=marked(record.problem)) for record in batch])
    summary = summarise(folder)
    _note_left_out(folder, summary["left_out_records"])
    for found in summary["temperatures"]:
        if found["without_end"] == 1:
            ends, of = end_tokens(model, tokenizer), f"at temperature {found['temperature']:g}"
            warnings.warn(cut_message(config.plan.max_new_tokens, ends, of), stacklevel=2)
    write_json(folder / SUMMARY, summary)
    return summary


def _head(model, prompts: list[list[int]]) -> Head | None:
    """None for a head that the operators do not know: answers are then judged without signals."""
    try:
        head = read_head(model)
        check_causal(model, head, min(prompts, key=len))
    except ModelError:
        return None
    return head


def _note_left_out(folder: Path, counts: dict[str, int]) -> None:
    """In eval.json: which lines of the records are not of the evaluation, while there are any."""
    written = read_json_object(folder / SETTINGS)
    if written.get("left_out_records", {}) != counts:
        write_json(folder / SETTINGS, {**written, "left_out_records": counts})


def _open(folder: Path, config: EvalConfig, loaded: Problems, found: dict) -> dict:
    """Begin the folder, or make sure that it holds this evaluation; the settings that it has."""
    settings = {
        "version": VERSION,
        "config": asdict(config),
        "problems": [problem._asdict() for problem in loaded.problems],
        "skipped": [row._asdict() for row in loaded.skipped],
        **found,
    }
    settings = json.loads(json.dumps(settings))
    if (folder / SETTINGS).exists():
        old = read_settings(folder)
        _check_same(folder, old, settings)
        repair_lines(folder / RECORDS)
        return old
    if any(path.name != LOCK for path in folder.iterdir()):
        raise EvalError(f"{folder} is not empty and holds no evaluation; give another folder")
    write_json(folder / SETTINGS, settings)
    return settings


def _check_same(folder: Path, old: dict, new: dict) -> None:
    for field in fields(EvalConfig):
        before, after = old["config"].get(field.name), new["config"][field.name]
        if field.name not in ELSEWHERE and before != after:
            raise EvalError(
                f"{folder} holds an evaluation with `{field.name}` {before!r}, got {after!r}; "
                "give another folder"
            )
    for name in ("problems", "too_long", "weights"):
        if old[name] != new[name]:
            raise EvalError(f"{folder} holds an evaluation of other {name}; give another folder")
