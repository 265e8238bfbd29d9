"""Entropy-controlled RL on the embedded model, over seeds, next to control arms.

    python -m benchmarks.rl_study --out benchmarks/results [--seeds 2 --updates 24]

What it asks, each with its arms (`ARMS`):

- entropy: how GRPO's entropy collapses, and what Clip-Cov, KL-Cov, the 80/20 mask and an entropy
  target do to it; random rewards are the control;
- law: whether held-out accuracy R follows R = -a exp(H) + b along the way, H the mean entropy;
- order: one-shot EM before RL, and after it;
- labels: EMPO and majority vote, which see no answers, next to verified rewards;
- length: ConciseR's two stages.

Arms train on problems of the "pretrain" split and are measured on "heldout"; settings were chosen
on "dev". Each finished arm and seed is kept in --cache and not run again. Writes rl_study.json,
.md and .png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from benchmarks.rl_study_plot import plot
from em_kernels import tiny_math
from em_kernels.evaluator import evaluate
from em_kernels.tiny_math.demo import heldout
from em_kernels.trainer import RLConfig, load_model, train

UPDATES = 24
EM_UPDATES = 10
CURVE = (2, 4, 8, 12, 16)
PRACTICE = 2000
EM = f"em:{{em_updates}}@{tiny_math.EM_LEARNING_RATE:g}"

ARMS = {
    "GRPO": dict(objective="grpo"),
    "Clip-Cov": dict(objective="clip_cov", ratio=0.03, cov_lower=0.2, cov_upper=20.0),
    "KL-Cov": dict(objective="kl_cov", ratio=0.1),
    "80/20": dict(objective="high_entropy"),
    "entropy target": dict(
        objective="entropy_bonus", entropy_coef=0.0, entropy_target=0.1, entropy_step=0.05
    ),
    "random reward": dict(objective="grpo", reward="random"),
    "EMPO": dict(objective="empo"),
    "majority vote": dict(objective="grpo", reward="majority"),
    "EM then GRPO": dict(schedule=f"{EM},grpo:{{updates}}"),
    "GRPO then EM": dict(schedule=f"grpo:{{updates}},{EM}"),
    "ConciseR": dict(schedule="grpo++:{updates},l-grpo:{updates}"),
}
ENTROPY_ARMS = ("GRPO", "Clip-Cov", "KL-Cov", "80/20", "entropy target", "random reward")
KEPT = (
    "update",
    "stage",
    "mean_entropy",
    "accuracy",
    "reward_mean",
    "response_length",
    "predicted_entropy_change",
    "entropy_change",
    "cov_mean",
    "cov_p99",
    "clip_fraction",
    "selected_fraction",
    "entropy_coef",
)


class Size(NamedTuple):
    """How much is run: updates of each stage with rewards, answers an update, problems, seeds."""

    updates: int
    responses: int
    problems: int
    seeds: int

    @property
    def em_updates(self) -> int:
        return min(EM_UPDATES, self.updates)


def settings(arm: str, seed: int, size: Size) -> RLConfig:
    """The run of an arm; the same optimiser, batch and problems for all."""
    own, total = dict(ARMS[arm]), size.updates
    if "schedule" in own:
        own["schedule"] = own["schedule"].format(updates=size.updates, em_updates=size.em_updates)
        total = sum(int(number) for number in re.findall(r":(\d+)", own["schedule"]))
    problems = tiny_math.make_problems("pretrain", PRACTICE, seed=11)
    common = dict(
        problems=tuple((p.text, str(p.answer)) for p in problems),
        prompts=(tiny_math.PROMPT,) if "em:" in own.get("schedule", "") else (),
        updates=total,
        responses=size.responses,
        group_size=8,
        micro_batch=64,
        minibatches=4,
        learning_rate=5e-5,
        max_new_tokens=tiny_math.MAX_NEW_TOKENS,
        judge="exact",
        device="cpu",
        seed=seed,
    )
    return RLConfig(**{**common, **own})


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
    config, problems = settings(arm, seed, size), heldout(size.problems)
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
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    if path.is_file():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == mark:
            return kept["result"]
    result = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"key": mark, "result": result}), encoding="utf-8")
    return result


def base(size: Size) -> list[dict]:
    """The untrained model, sampled with every seed."""
    problems = heldout(size.problems)
    model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
    return [measure(model, tokenizer, problems, seed, greedy=True) for seed in range(size.seeds)]


def fit_law(points: list[tuple[float, float]]) -> dict:
    """Least squares of R = -a exp(H) + b over (H, R): a, b, ceiling b - a, residual and r^2.

    Source: Cui et al., "The Entropy Mechanism of Reinforcement Learning for Reasoning Language
    Models" (2025), arXiv:2505.22617.
    """
    import numpy

    entropy, reward = (numpy.array(values) for values in zip(*points))
    slope, b = numpy.polyfit(numpy.exp(entropy), reward, 1)
    residual = reward - (slope * numpy.exp(entropy) + b)
    explained = 1 - residual.var() / reward.var() if reward.var() > 0 else 0.0
    return {
        "a": -float(slope),
        "b": float(b),
        "ceiling": float(b + slope),
        "residual": float(residual.std()),
        "r2": float(explained),
        "points": len(points),
    }


def law_points(runs: list[dict]) -> list[tuple[float, float]]:
    """(H, R) of the same model: held-out accuracy after u updates, mean entropy of update u + 1."""
    pairs = []
    for run in runs:
        entropy = {line["update"] - 1: line["mean_entropy"] for line in run["lines"]}
        pairs += [
            (entropy[p["update"]], p["sampled"]) for p in run["points"] if p["update"] in entropy
        ]
    return pairs


def prediction(runs: list[dict]) -> dict:
    """How the predicted change of entropy goes with the measured one, over the updates of an arm.

    The prediction is that of a plain step in logit space, so its scale is not AdamW's: what is
    compared is the correlation, and how often the sign is right.
    """
    lines = [line for run in runs for line in run["lines"] if "entropy_change" in line]
    measured = [line["entropy_change"] for line in lines]
    predicted = [line["predicted_entropy_change"] for line in lines]
    covariance = [-line["cov_mean"] for line in lines]
    same = sum((p > 0) == (m > 0) for p, m in zip(predicted, measured))
    return {
        "updates": len(lines),
        "correlation": statistics.correlation(predicted, measured),
        "covariance_correlation": statistics.correlation(covariance, measured),
        "same_sign": same / len(lines),
    }


def run_study(size: Size, arms: list[str], cache: Path) -> dict:
    study = {
        **size._asdict(),
        "em_updates": size.em_updates,
        "curve_problems": max(size.problems // 2, 1),
        "base": cached(cache / "base.json", size._asdict(), partial(base, size)),
        "arms": {arm: [] for arm in arms},
    }
    for seed in range(size.seeds):
        for arm in arms:
            key = {"problems": size.problems, **settings(arm, seed, size).to_dict()}
            path = cache / f"{arm.replace('/', '-').replace(' ', '-')}-{seed}.json"
            run = cached(path, key, partial(run_arm, arm, seed, size))
            study["arms"][arm].append(run)
            print(f"seed {seed}, {arm}: {run['cpu_seconds']:.0f} s of CPU time", flush=True)
    study["law"] = {arm: fit_law(law_points(study["arms"][arm])) for arm in _law_arms(study)}
    study["prediction"] = {
        arm: prediction(study["arms"][arm]) for arm in arms if arm in ENTROPY_ARMS
    }
    return study


def _law_arms(study: dict) -> list[str]:
    """Those of GRPO and its entropy controls with points enough for a fit."""
    arms = [arm for arm in ("GRPO", "Clip-Cov", "KL-Cov", "80/20") if arm in study["arms"]]
    return [arm for arm in arms if len(law_points(study["arms"][arm])) > 2]


def tables(study: dict) -> str:
    """Markdown: every arm after its last update, then the law, then predicted against measured."""
    error = 0.5 / study["problems"] ** 0.5
    lines = [
        f"{study['problems']} held-out problems, mean ± standard deviation over seeds "
        f"({study['seeds']}); {study['updates']} updates of {study['responses']} answers, EM for "
        f"{study['em_updates']}, each stage of ConciseR for {study['updates']}. One standard error "
        f"of a single accuracy is at most {error:.3f}. Entropy: mean over the sampled tokens of "
        "the last four updates on the practice problems, nats.",
        "",
        "| arm | entropy | sampled, T = 1 | greedy | length |",
        "|---|---|---|---|---|",
        _row("untrained", [{**b, "entropy": None} for b in study["base"]]),
    ]
    for arm, runs in study["arms"].items():
        lines.append(_row(arm, [{**run["points"][-1], "entropy": _last(run)} for run in runs]))
    lines += ["", "R = -a exp(H) + b, R held-out accuracy, over the points of all seeds:", ""]
    lines += ["| arm | a | b | ceiling b - a | residual (sd) | r² | points |", "|---" * 7 + "|"]
    for arm, law in study["law"].items():
        numbers = [law[name] for name in ("a", "b", "ceiling", "residual", "r2")]
        lines.append(f"| {arm} | " + " | ".join(f"{n:.3f}" for n in numbers) + _end(law["points"]))
    lines += ["", "Change of mean entropy on an update's own answers, against two predictions:", ""]
    lines += [
        "| arm | entropy_slope: correlation | right sign | covariance: correlation | updates |"
    ]
    lines += ["|---" * 5 + "|"]
    for arm, found in study["prediction"].items():
        numbers = (found["correlation"], found["same_sign"], found["covariance_correlation"])
        lines.append(
            f"| {arm} | " + " | ".join(f"{n:.2f}" for n in numbers) + _end(found["updates"])
        )
    return "\n".join(lines) + "\n"


def _end(number: int) -> str:
    return f" | {number} |"


def _last(run: dict) -> float:
    """Mean entropy of the last four updates with an RL objective."""
    entropies = [line["mean_entropy"] for line in run["lines"] if "reward_mean" in line]
    return statistics.fmean(entropies[-4:])


def _row(name: str, points: list[dict]) -> str:
    labels = (("entropy", ".3f"), ("sampled", ".3f"), ("greedy", ".3f"), ("length", ".1f"))
    return f"| {name} | " + " | ".join(_cell(points, *label) for label in labels) + " |"


def _cell(points: list[dict], label: str, digits: str) -> str:
    values = [point[label] for point in points if point[label] is not None]
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{digits}} ± {deviation:{digits}}"


def rounded(value):
    """Floats to six digits, at any depth."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path("rl-study-output"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--responses", type=int, default=64, help="sampled answers an update")
    parser.add_argument("--problems", type=int, default=600, help="held-out problems")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    size = Size(given.updates, given.responses, given.problems, given.seeds)
    study = run_study(size, given.arms, given.cache)
    given.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(study))
    (given.out / "rl_study.json").write_text(text + "\n", encoding="utf-8")
    text = tables(study)
    (given.out / "rl_study.md").write_text(text, encoding="utf-8")
    plot(study, given.out / "rl_study.png")
    print(text)


if __name__ == "__main__":
    main()
