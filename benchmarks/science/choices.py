"""What is chosen on dev problems before it is measured on held-out ones: prompts and rates."""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path

from benchmarks.science.arms import PROMPTS, RATES, SELECTIONS, rate_arm
from benchmarks.science.store import Store
from em_kernels import tiny_math
from em_kernels.evaluator import EvalConfig, rank_prompts, run_eval

CANDIDATES, SAMPLES = 200, 16


class Choices:
    """Read from the data files; the prompts are ranked, and kept there, when first asked for."""

    def __init__(self, store: Store):
        self.store = store

    def prompts(self, way: str) -> list[str]:
        """The prompts that this way of selecting gives, the best first."""
        return self.store.cached("selection", ranked)[way]

    def rate(self, temperature: float) -> float:
        """Of EM at that temperature: the most accurate on dev problems, sampled at T = 1."""

        def accuracy(rate: float) -> float:
            return statistics.fmean(self.store.accuracy(rate_arm(temperature, rate), 10).values())

        return max(RATES, key=accuracy)


def ranked() -> dict:
    """The first prompts by each way, of the same candidates, answered by the untrained model."""
    problems = tiny_math.make_problems("dev", CANDIDATES, seed=7)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problems.jsonl"
        lines = [json.dumps({"problem": p.text, "answer": str(p.answer)}) for p in problems]
        path.write_text("\n".join(lines), encoding="utf-8")
        config = EvalConfig(
            model=str(tiny_math.model_path()),
            problems=str(path),
            output=str(Path(folder) / "answers"),
            samples=SAMPLES,
            temperatures=(1.0,),
            max_new_tokens=tiny_math.MAX_NEW_TOKENS,
            judge="exact",
            device="cpu",
        )
        run_eval(config, progress=False)
        found = {
            way: [row["prompt"] for row in rank_prompts(config.output, way, PROMPTS)]
            for way in SELECTIONS
            if way != "random"
        }
    return {**found, "random": random.Random(0).sample([p.text for p in problems], PROMPTS)}
