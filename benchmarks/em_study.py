"""One-shot EM on the embedded model over seeds, next to two controls.

    python -m benchmarks.em_study --out benchmarks/results [--seeds 5 --problems 2000 --updates 50]

Arms, all of 64 sampled answers an update with the same optimiser settings:

- em: entropy minimisation on the one unlabelled prompt, followed to step 50 (over-confidence);
- outside prompt: the same loss on a prompt that has nothing to do with the task, 10 updates;
- random reward: the same prompt, a policy gradient on rewards drawn by a coin, 10 updates.

Every arm and seed is measured on the same held-out problems. Writes em_study.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from em_kernels import tiny_math
from em_kernels.tiny_math.demo import MODES, em_config, heldout, measure
from em_kernels.trainer import load_model, train

CONTROL_UPDATES = 10
CURVE = (2, 5, 10, 20, 30, 50)
FULL = (10, 50)
COLOURS = {"em": "#0072B2", "outside prompt": "#E69F00", "random reward": "#CC79A7"}


def random_reward(seed: int):
    """Weights of a policy gradient whose rewards are fair coin tosses, normalised in the group."""
    generator = torch.Generator().manual_seed(seed)

    def weigh(rollout, loss_mask):
        reward = torch.randint(0, 2, (loss_mask.shape[0],), generator=generator).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        mask = loss_mask.float()
        return None, -advantage[:, None] * mask / mask.sum().clamp(min=1)

    return weigh


def run_arm(arm: str, seed: int, problems: list, updates: int) -> list[dict]:
    """Accuracies at the points of the curve: {"update", label: accuracy, ...} each."""
    model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
    points = []

    def watch(line: dict, model) -> None:
        update = line["update"]
        last = update == updates
        if update in CURVE or last:
            modes = MODES if update in FULL or last else MODES[:1]
            scores = {
                label: measure(model, tokenizer, problems, t, seed).value for label, t in modes
            }
            points.append({"update": update, "mean_entropy": line["mean_entropy"], **scores})

    outside = arm == "outside prompt"
    prompt = tiny_math.OUTSIDE_PROMPT if outside else tiny_math.PROMPT
    config = em_config(seed=seed, updates=updates, prompts=(prompt,))
    objective = random_reward(seed) if arm == "random reward" else None
    train(config, model, tokenizer, objective=objective, on_step=watch, progress=False)
    return points


def base(problems: list, seeds: int) -> list[dict]:
    """The untrained model, sampled with every seed."""
    model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
    return [
        {label: measure(model, tokenizer, problems, t, seed).value for label, t in MODES}
        for seed in range(seeds)
    ]


def spread(values: list[float]) -> str:
    """mean ± standard deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def tables(study: dict) -> str:
    """Markdown: the arms at 10 updates, then the curve of EM."""
    labels = [label for label, _ in MODES]
    lines = [
        f"{study['problems']} held-out problems, {study['seeds']} seeds, mean ± standard deviation "
        "over seeds; one answer a problem. One standard error of a single accuracy is at most "
        f"{0.5 / study['problems'] ** 0.5:.3f}.",
        "",
        f"| after {study['control_updates']} updates | " + " | ".join(labels) + " |",
        "|---" * (len(labels) + 1) + "|",
        _row("untrained", study["base"], labels),
    ]
    for arm, runs in study["arms"].items():
        at = [_at(points, study["control_updates"]) for points in runs]
        lines.append(_row(arm, at, labels))
    updates = [point["update"] for point in study["arms"]["em"][0]]
    lines += ["", "| EM, update | 0 | " + " | ".join(map(str, updates)) + " |"]
    lines.append("|---" * (len(updates) + 2) + "|")
    for label in [*labels, "mean_entropy"]:
        cells = [_cell(study["base"], label)]
        for update in updates:
            cells.append(_cell([_at(points, update) for points in study["arms"]["em"]], label))
        lines.append(f"| {label.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _at(points: list[dict], update: int) -> dict:
    return next(point for point in points if point["update"] == update)


def _row(name: str, runs: list[dict], labels: list[str]) -> str:
    return f"| {name} | " + " | ".join(_cell(runs, label) for label in labels) + " |"


def _cell(runs: list[dict], label: str) -> str:
    values = [run[label] for run in runs if label in run]
    return spread(values) if values else ""


def plot(study: dict, path: Path) -> None:
    """Accuracy at temperature 1 against updates: every seed thin, the mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    label = MODES[0][0]
    start = statistics.fmean(run[label] for run in study["base"])
    figure, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for arm, runs in study["arms"].items():
        updates = [0, *(point["update"] for point in runs[0])]
        curves = [[start, *(point[label] for point in points)] for points in runs]
        mean = [statistics.fmean(values) for values in zip(*curves)]
        for curve in curves:
            axis.plot(updates, curve, color=COLOURS[arm], alpha=0.3, linewidth=1)
        axis.plot(updates, mean, color=COLOURS[arm], marker="o", linewidth=2.2)
        axis.annotate(
            arm,
            (updates[-1], mean[-1]),
            (6, -3),
            textcoords="offset points",
            color=COLOURS[arm],
        )
    axis.axhline(start, color="grey", linestyle=":", linewidth=1)
    axis.set(xlabel="optimiser updates", ylabel=f"accuracy, {label}", ylim=(0, 1))
    axis.set_xlim(right=study["updates"] * 1.15)
    axis.set_title(
        f"One-shot EM and two controls: {study['problems']} held-out problems, "
        f"{study['seeds']} seeds (thin lines)",
        fontsize=11,
    )
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def run_study(seeds: int, problem_count: int, updates: int) -> dict:
    problems = heldout(problem_count)
    control = min(CONTROL_UPDATES, updates)
    study = {
        "problems": problem_count,
        "seeds": seeds,
        "updates": updates,
        "control_updates": control,
        "learning_rate": tiny_math.EM_LEARNING_RATE,
        "temperature": tiny_math.EM_TEMPERATURE,
        "base": base(problems, seeds),
        "arms": {},
    }
    lengths = {"em": updates, "outside prompt": control, "random reward": control}
    for arm, length in lengths.items():
        study["arms"][arm] = []
        for seed in range(seeds):
            began = time.perf_counter()
            study["arms"][arm].append(run_arm(arm, seed, problems, length))
            print(f"{arm}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    return study


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--updates", type=int, default=50)
    given = parser.parse_args(arguments)
    study = run_study(given.seeds, given.problems, given.updates)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "em_study.json").write_text(json.dumps(study, indent=1), encoding="utf-8")
    text = tables(study)
    (given.out / "em_study.md").write_text(text, encoding="utf-8")
    plot(study, given.out / "em_study.png")
    print(text)


if __name__ == "__main__":
    main()
