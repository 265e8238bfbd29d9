"""A whole evaluation: every problem, several times, at several temperatures, on disk as it goes.

The folder of an evaluation holds eval.json (the settings, the problems, what was left out),
records.jsonl (one line an answer) and summary.json. A stopped evaluation goes on where it was: each
batch is drawn from its own seed, so the answers are those of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from em_kernels.evaluator.asking import (
    NOT_ASKED,
    Asked,
    default_batch_size,
    longest_prompt,
    weights_digest,
)
from em_kernels.evaluator.records import (
    RECORDS,
    SETTINGS,
    SUMMARY,
    EvalError,
    Record,
    Records,
    read_settings,
    repair_lines,
    write_json,
)
from em_kernels.evaluator.summary import summarise
from em_kernels.lm.data import encode_prompt
from em_kernels.lm.heads import Head, ModelError, read_head
from em_kernels.lm.judge.judges import JUDGES, judge_name, make_judge
from em_kernels.lm.models import DTYPES, check_causal, load_model
from em_kernels.lm.problems import Problems, Source, find_source, load_problems
from em_kernels.lm.random_state import RandomState
from em_kernels.lm.rollout import Sampling
from em_kernels.lm.settings import check_choice, check_float, check_int


@dataclass(frozen=True)
class EvalConfig:
    """Everything that decides what an evaluation does.

    Args:
        model: a folder or a hub name.
        problems: a .jsonl or .parquet file, a data set's name, or a preset (see `PRESETS`).
        output: folder of the evaluation.
        samples: answers to each problem at each temperature above 0; None is the preset's, else 1.
        temperatures: of the sampling; 0 takes the likeliest token each time, once. None is greedy
            and the preset's temperature, else greedy and 1.
        top_p, max_new_tokens: of the sampling; None is the preset's, else 1 and 2048.
        batch_size: answers at once; None as in `evaluate`.
        judge: what decides whether an answer is right, by name.
        template: the prompt around {problem}; None is the preset's, else the bare problem.
        limit: only the first so many problems.
        labelled: the problems have answers; without, every answer counts as wrong.
        dtype, device: of the model.
        seed: of the sampling.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """

    model: str
    problems: str
    output: str
    samples: int | None = None
    temperatures: tuple[float, ...] | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    judge: str = "auto"
    template: str | None = None
    limit: int | None = None
    labelled: bool = True
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for name in ("model", "problems", "output"):
            object.__setattr__(self, name, os.fspath(getattr(self, name)))
        for name in ("samples", "max_new_tokens", "batch_size", "limit"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        check_choice("judge", self.judge, JUDGES)
        check_choice("dtype", self.dtype, DTYPES)
        if self.top_p is not None:
            check_float("top_p", self.top_p, lambda v: 0 < v <= 1, "in (0, 1]")
        if self.temperatures is not None:
            object.__setattr__(self, "temperatures", _temperatures(self.temperatures))

    def filled(self, source: Source, batch_size: int) -> EvalConfig:
        """With what was left open taken from the source and the model."""
        usual = {"samples": 1, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 2048}
        usual |= source.settings
        usual["temperatures"] = (0.0, float(usual.pop("temperature")))
        usual |= {"template": source.template, "batch_size": batch_size}
        values = {name: getattr(self, name) for name in usual}
        chosen = {name: usual[name] if value is None else value for name, value in values.items()}
        return EvalConfig(**{**asdict(self), **chosen})


def run_eval(config: EvalConfig, *, model=None, tokenizer=None, progress: bool = True) -> dict:
    """Ask and judge whatever the folder does not have yet; returns the summary, see `summarise`.

    Args:
        config: see `EvalConfig`.
        model, tokenizer: in place of loading `config.model`.
        progress: show a bar.

    Raises:
        EvalError: the folder holds an evaluation with other settings.
        FileNotFoundError, ImportError, ValueError: of the problems or the model.
    """
    changes = {} if config.template is None else {"template": config.template}
    if not config.labelled:
        changes["answer"] = ()
    source = find_source(config.problems, **changes)
    loaded = load_problems(source, config.limit)
    if model is None:
        import torch

        dtype = getattr(torch, config.dtype)
        model, tokenizer = load_model(config.model, config.device, dtype)
    judge = make_judge(config.judge) if config.labelled else _nothing_is_right
    config = config.filled(source, config.batch_size or default_batch_size(model))
    config = replace(config, judge=judge_name(judge) if config.labelled else config.judge)
    folder = Path(config.output)
    prompts = [encode_prompt(tokenizer, source.prompt(p.problem)) for p in loaded.problems]
    limit = longest_prompt(model)
    too_long = [i for i, ids in enumerate(prompts) if limit is not None and len(ids) > limit]
    found = {"too_long": too_long, "weights": weights_digest(model)}
    _open(folder, config, loaded, found)
    asked = Asked(model, tokenizer, judge, _head(model, prompts))
    _ask_all(asked, config, loaded, prompts, set(too_long), Records(folder / RECORDS), progress)
    summary = summarise(folder)
    write_json(folder / SUMMARY, summary)
    return summary


def _nothing_is_right(response: str, answer: str) -> bool:
    return False


def _head(model, prompts: list[list[int]]) -> Head | None:
    """None for a head that the operators do not know: answers are then judged without signals."""
    try:
        head = read_head(model)
        check_causal(model, head, min(prompts, key=len))
    except ModelError:
        return None
    return head


def _open(folder: Path, config: EvalConfig, loaded: Problems, found: dict) -> None:
    """Begin the folder, or make sure that it holds this evaluation."""
    settings = {
        "config": asdict(config),
        "problems": [problem._asdict() for problem in loaded.problems],
        "skipped": [row._asdict() for row in loaded.skipped],
        **found,
    }
    settings = json.loads(json.dumps(settings))
    if (folder / SETTINGS).exists():
        _check_same(folder, read_settings(folder), settings)
        repair_lines(folder / RECORDS)
        return
    if folder.exists() and any(folder.iterdir()):
        raise EvalError(f"{folder} is not empty and holds no evaluation; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SETTINGS, settings)


def _check_same(folder: Path, old: dict, new: dict) -> None:
    elsewhere = ("output", "device")
    for field in fields(EvalConfig):
        before, after = old["config"].get(field.name), new["config"][field.name]
        if field.name not in elsewhere and before != after:
            raise EvalError(
                f"{folder} holds an evaluation with {field.name} {before!r}, got {after!r}; "
                "give another folder"
            )
    for name in ("problems", "too_long", "weights"):
        if old[name] != new[name]:
            raise EvalError(f"{folder} holds an evaluation of other {name}; give another folder")


def _ask_all(
    asked: Asked,
    config: EvalConfig,
    loaded: Problems,
    prompts: list[list[int]],
    too_long: set[int],
    records: Records,
    progress: bool,
) -> None:
    from tqdm import tqdm

    done = {record.key for record in records}
    total = len(prompts) * sum(config.samples if t > 0 else 1 for t in config.temperatures)
    options = dict(desc="eval", unit="answer", disable=not progress)
    with tqdm(total=total, initial=len(done), **options) as bar:
        for temperature, number, batch in _batches(config, prompts):
            keys = [(i, temperature, s) for i, s in batch]
            if done.issuperset(keys):
                continue
            sampling = Sampling(
                temperature=temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens
            )
            askable = [i for i, _ in batch if i not in too_long]
            with RandomState(_batch_seed(config.seed, temperature, number)):
                rights = [loaded.problems[i].answer for i in askable]
                answers = asked.ask([prompts[i] for i in askable], rights, sampling)
            found = iter(answers)
            new = [Record(*key, NOT_ASKED if key[0] in too_long else next(found)) for key in keys]
            new = [record for record in new if record.key not in done]
            records.add(new)
            bar.update(len(new))


def _batch_seed(seed: int, temperature: float, number: int) -> int:
    from numpy.random import SeedSequence

    return int(SeedSequence([seed, round(temperature * 1e6), number]).generate_state(1)[0])


def _batches(
    config: EvalConfig, prompts: list[list[int]]
) -> Iterator[tuple[float, int, list[tuple[int, int]]]]:
    """(temperature, batch number, [(problem, sample)]): problems of similar length together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for temperature in config.temperatures:
        times = config.samples if temperature > 0 else 1
        turns = [(i, s) for i in order for s in range(times)]
        for number, start in enumerate(range(0, len(turns), config.batch_size)):
            yield temperature, number, turns[start : start + config.batch_size]


def _temperatures(values) -> tuple[float, ...]:
    values = tuple(float(v) for v in ([values] if isinstance(values, (int, float)) else values))
    if not values or len(set(values)) < len(values):
        raise ValueError(f"temperatures must be different numbers, got {values}")
    for value in values:
        if not 0 <= value < math.inf:
            raise ValueError(f"temperature must be 0 or more and finite, got {value!r}")
    return values
