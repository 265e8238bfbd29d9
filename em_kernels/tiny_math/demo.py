"""One-shot entropy minimisation on the embedded model, measured before, during and after.

    python -m em_kernels.tiny_math.demo --out demo-output

trains on one unlabelled prompt, and writes metrics.jsonl, checkpoints, demo.json and demo.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from em_kernels import tiny_math
from em_kernels.evaluator import evaluate
from em_kernels.trainer import TrainConfig, TrainResult, load_model, train

PROBLEMS = 600
RUN = "demo-run"  # folder of the run inside --out; one of an earlier demo is replaced
# What to measure: label, temperature (0 is greedy).
MODES = (("sampled, T = 1", 1.0), ("sampled, T = 0.5", 0.5), ("greedy", 0.0))


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers and its standard error."""

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.stderr:.3f}"


def em_config(**settings) -> TrainConfig:
    """The settings of one-shot EM on the embedded model, chosen on dev problems."""
    chosen = dict(
        prompts=(tiny_math.PROMPT,),
        updates=10,
        responses=64,
        micro_batch=64,
        learning_rate=tiny_math.EM_LEARNING_RATE,
        loss_temperature=tiny_math.EM_TEMPERATURE,
        sampling_temperature=tiny_math.EM_TEMPERATURE,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=tiny_math.MAX_NEW_TOKENS,
        device="cpu",
    )
    return TrainConfig(**{**chosen, **settings})


def heldout(count: int) -> list[tuple[str, str]]:
    """(problem, answer) pairs that neither the model nor any choice has seen."""
    return [(p.text, str(p.answer)) for p in tiny_math.make_problems("heldout", count)]


def measure(
    model, tokenizer, problems: list, temperature: float, seed: int = 0, progress: bool = False
) -> Accuracy:
    """Accuracy with one answer a problem at `temperature`; 0 is greedy."""
    greedy = temperature == 0
    result = evaluate(
        model,
        tokenizer,
        problems,
        samples=0 if greedy else 1,
        temperature=temperature or 1.0,
        greedy=greedy,
        max_new_tokens=tiny_math.MAX_NEW_TOKENS,
        judge="exact",
        seed=seed,
        progress=progress,
    )
    if greedy:
        return Accuracy(result.greedy_accuracy, result.greedy_stderr)
    return Accuracy(result.sampled_accuracy, result.sampled_stderr)


def run(out: Path, problem_count: int, updates: int, seed: int) -> dict:
    """Measure, train, measure; returns what demo.json holds."""
    shutil.rmtree(out / RUN, ignore_errors=True)
    problems = heldout(problem_count)
    model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
    print(f"Before: {problem_count} held-out problems, one answer each ...", flush=True)
    before = {label: measure(model, tokenizer, problems, t, seed) for label, t in MODES}
    curve = [before[MODES[0][0]]]

    def watch(line: dict, model) -> None:
        curve.append(measure(model, tokenizer, problems, 1.0, seed))

    print(f"One-shot EM: {updates} updates on one unlabelled prompt:\n  {tiny_math.PROMPT}")
    print("Accuracy is measured after every update, which is most of the time.", flush=True)
    config = em_config(output=str(out / RUN), updates=updates, seed=seed, save_every=0)
    result = train(config, model, tokenizer, on_step=watch)
    after = {label: measure(model, tokenizer, problems, t, seed) for label, t in MODES}
    return _summary(before, after, curve, result, problem_count, seed)


def _summary(
    before: dict, after: dict, curve: list, result: TrainResult, problem_count: int, seed: int
) -> dict:
    accuracy = {
        label: {"before": vars(before[label]), "after": vars(after[label])} for label, _ in MODES
    }
    metrics = result.metrics
    return {
        "problems": problem_count,
        "seed": seed,
        "updates": len(metrics),
        "prompt": tiny_math.PROMPT,
        "accuracy": accuracy,
        "accuracy_per_update": [vars(point) for point in curve],
        "mean_entropy_per_update": [line["mean_entropy"] for line in metrics],
        "sample_seconds": sum(line["sample_seconds"] for line in metrics),
        "loss_seconds": sum(line["loss_seconds"] for line in metrics),
    }


def table(summary: dict) -> str:
    """The summary as text."""
    updates = summary["updates"]
    lines = [f"{'accuracy':<18}{'before':>16}{f'after {updates}':>16}{'change':>10}"]
    for label, pair in summary["accuracy"].items():
        before, after = Accuracy(**pair["before"]), Accuracy(**pair["after"])
        change = f"{after.value - before.value:+.3f}"
        lines.append(f"{label:<18}{before!s:>16}{after!s:>16}{change:>10}")
    entropy = summary["mean_entropy_per_update"]
    lines.append(
        f"mean entropy on the prompt: {entropy[0]:.3f} nats in update 1, "
        f"{entropy[-1]:.4f} in update {updates}"
    )
    points = [point["value"] for point in summary["accuracy_per_update"]]
    best = max(range(len(points)), key=points.__getitem__)
    lines.append(f"best accuracy at T = 1: {points[best]:.3f}, after update {best}")
    spent = summary["sample_seconds"] + summary["loss_seconds"]
    lines.append(
        f"training: {spent:.1f} s ({summary['sample_seconds']:.1f} s of it sampling), "
        f"{summary['problems']} held-out problems, ± is one standard error"
    )
    return "\n".join(lines)


def plot(summary: dict, path: Path) -> None:
    """Accuracy and entropy per update, one above the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    points = summary["accuracy_per_update"]
    entropy = summary["mean_entropy_per_update"]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(7, 6.2), layout="constrained")
    updates = range(len(points))
    values = [point["value"] for point in points]
    errors = [point["stderr"] for point in points]
    top.errorbar(updates, values, yerr=errors, color="#0072B2", marker="o", capsize=3)
    greedy = summary["accuracy"]["greedy"]
    ends = [greedy["before"]["value"], greedy["after"]["value"]]
    top.plot([0, len(points) - 1], ends, "s", color="#D55E00")
    top.annotate("greedy", (0, ends[0]), (8, -4), textcoords="offset points", color="#D55E00")
    top.annotate(
        "sampled, T = 1", (0, values[0]), (8, -12), textcoords="offset points", color="#0072B2"
    )
    top.set(ylabel="accuracy", ylim=(0, 1))
    top.set_title(
        f"One-shot entropy minimisation, {summary['problems']} held-out problems, "
        f"seed {summary['seed']}\n(bars: one standard error)",
        fontsize=11,
    )
    # Update u samples from the model as it was after u - 1 updates.
    bottom.plot(range(len(entropy)), entropy, color="#009E73", marker="o")
    bottom.set(
        xlabel="optimiser updates taken", ylabel="mean entropy on the prompt\n(nats per token)"
    )
    bottom.set_ylim(bottom=0)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder to write")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="held-out problems")
    parser.add_argument("--updates", type=int, default=10, help="optimiser updates")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    logging.disable_progress_bar()
    summary = run(given.out, given.problems, given.updates, given.seed)
    (given.out / "demo.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    plot(summary, given.out / "demo.png")
    print(f"\n{table(summary)}\n")
    print(f"picture: {given.out / 'demo.png'}; checkpoint: {given.out / RUN}")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
