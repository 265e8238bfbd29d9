"""Entropy-controlled RL on the embedded model, over seeds, next to control arms.

    python -m benchmarks.rl_study --out benchmarks/results [--seeds 2 --updates 24]

What it asks, each with its arms (`arms.ARMS`):

- entropy: how GRPO's entropy collapses, and what Clip-Cov, KL-Cov, the 80/20 mask, REPO-R, a bonus
  and an entropy target do to it; random rewards are the control;
- law: whether held-out accuracy R follows R = -a exp(H) + b along the way, H the mean entropy; and
  whether the first fifth of a run tells its end;
- change: how the predicted changes of entropy go with the measured one, under every objective;
- order: one-shot EM before RL, and after it;
- labels: EMPO and majority vote, which see no answers, next to verified rewards;
- length: ConciseR's two stages.

Arms train on problems of the "pretrain" split and are measured on "heldout"; settings were chosen
on "dev". Each finished arm and seed is kept in --cache and not run again; with --kept-only no run
is started, and every arm has the seeds that are there. Writes rl_study.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from transformers.utils import logging

from benchmarks.rl_study import runs
from benchmarks.rl_study.arms import ARMS, ONE_OBJECTIVE, UPDATES, Size
from benchmarks.rl_study.findings import law, law_forecast, law_points, prediction
from benchmarks.rl_study.plot import plot
from benchmarks.rl_study.tables import tables


def run_study(size: Size, arms: list[str], cache: Path, kept_only: bool = False) -> dict:
    """Every arm with every seed, and what is found in them."""
    base = runs.cached(cache / "base.json", size._asdict(), partial(runs.base, size))
    study: dict = {
        **size._asdict(),
        "em_updates": size.em_updates,
        "curve_problems": max(size.problems // 2, 1),
        "base": base,
        "arms": {arm: [] for arm in arms},
    }
    for seed in range(size.seeds):
        for arm in arms:
            key = {"problems": size.problems, **runs.study_settings(arm, seed, size).to_dict()}
            path = cache / f"{arm.replace('/', '-').replace(' ', '-')}-{seed}.json"
            if kept_only and not runs.is_kept(path, key):
                continue
            run = runs.cached(path, key, partial(runs.run_arm, arm, seed, size))
            study["arms"][arm].append(run)
            print(f"seed {seed}, {arm}: {run['cpu_seconds']:.0f} s of CPU time", flush=True)
    study["arms"] = {arm: found for arm, found in study["arms"].items() if found}
    return {**study, **findings(study["arms"])}


def findings(arms: dict[str, list[dict]]) -> dict:
    """Of the arms with one objective throughout, what there are points enough for."""
    single = {arm: found for arm, found in arms.items() if arm in ONE_OBJECTIVE}
    points = {arm: law_points(found) for arm, found in single.items()}
    long = [arm for arm, found in single.items() if len(found[0]["lines"]) >= 15]
    return {
        "law": {arm: law(pairs) for arm, pairs in points.items() if len(pairs) > 2},
        "forecast": {arm: law_forecast(single[arm]) for arm in long},
        "prediction": {arm: prediction(found) for arm, found in single.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache", type=Path, default=Path("rl-study-output"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--responses", type=int, default=64, help="sampled answers an update")
    parser.add_argument("--problems", type=int, default=600, help="held-out problems")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--kept-only", action="store_true", help="only what is in --cache")
    given = parser.parse_args(arguments)
    logging.disable_progress_bar()
    size = Size(given.updates, given.responses, given.problems, given.seeds)
    study = run_study(size, given.arms, given.cache, given.kept_only)
    given.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(runs.rounded(study))
    (given.out / "rl_study.json").write_text(text + "\n", encoding="utf-8")
    text = tables(study)
    (given.out / "rl_study.md").write_text(text, encoding="utf-8")
    plot(study, given.out / "rl_study.png")
    print(text)


if __name__ == "__main__":
    main()
