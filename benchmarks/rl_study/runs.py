"""One arm with one seed: a run of the trainer, measured along the way, and kept."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.rl_study.arms import Size, settings
from em_kernels import tiny_math
from em_kernels.evaluator import evaluate
from em_kernels.tiny_math.demo import heldout
from em_kernels.trainer import RLConfig, load_model, train

CURVE = (2, 4, 8, 12, 16)
KEPT = (
    "update",
    "stage",
    "mean_entropy",
    "accuracy",
    "reward_mean",
    "response_length",
    "predicted_entropy_change",
    "predicted_entropy_change_weights",
    "entropy_change",
    "cov_mean",
    "cov_p99",
    "clip_fraction",
    "selected_fraction",
    "entropy_coef",
    "repo_zeta",
)


def study_settings(arm: str, seed: int, size: Size) -> RLConfig:
    """The run of an arm, with both predictions of the change of entropy."""
    return replace(settings(arm, seed, size), predict_change="weights")


def measure(model, tokenizer, problems: list, seed: int, greedy: bool = False) -> dict:
    """Accuracy and length of one sampled answer a problem at temperature 1; greedy on request."""
    options = dict(max_new_tokens=tiny_math.MAX_NEW_TOKENS, judge="exact", progress=False)
    drawn = evaluate(model, tokenizer, problems, greedy=False, seed=seed, **options)
    found = {"sampled": drawn.sampled_accuracy, "length": drawn.response_length}
    if greedy:
        best = evaluate(model, tokenizer, problems, samples=0, **options)
        found["greedy"] = best.greedy_accuracy
    return found


def run_arm(arm: str, seed: int, size: Size) -> dict:
    """{"points": held-out accuracy along the way, "lines": metrics of every update}.

    Points of the curve use half of the problems, the last one all of them. A point at `update` u
    goes with the mean entropy of update u + 1, which is sampled from the same model.
    """
    config, problems = study_settings(arm, seed, size), heldout(size.problems)
    part = problems[: max(size.problems // 2, 1)]
    model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
    points = [{"update": 0, **measure(model, tokenizer, part, seed)}]

    def watch(line: dict, model) -> None:
        update = line["update"]
        if update == config.updates:
            points.append({"update": update, **measure(model, tokenizer, problems, seed, True)})
        elif update in CURVE or update % size.updates == 0:
            points.append({"update": update, **measure(model, tokenizer, part, seed)})

    began = time.process_time()
    result = train(config, model, tokenizer, on_step=watch, progress=False)
    lines = [{name: line[name] for name in KEPT if name in line} for line in result.metrics]
    return {"points": points, "lines": lines, "cpu_seconds": time.process_time() - began}


def cached(path: Path, key: dict, make) -> dict:
    """The result in `path` if it was made with the same `key`, else made and kept."""
    if is_kept(path, key):
        return json.loads(path.read_text(encoding="utf-8"))["result"]
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": _mark(key), "result": result}), encoding="utf-8")
    return result


def is_kept(path: Path, key: dict) -> bool:
    """Whether `path` has a result that was made with this `key`."""
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["key"] == _mark(key)


def _mark(key: dict) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def base(size: Size) -> list[dict]:
    """The untrained model, sampled with every seed."""
    problems = heldout(size.problems)
    model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
    return [measure(model, tokenizer, problems, seed, greedy=True) for seed in range(size.seeds)]


def rounded(value):
    """Floats to six digits, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
