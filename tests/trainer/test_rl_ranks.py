"""RL over two ranks: the numbers of one process, whatever the objective."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from logger_stand_ins import put_in
from rl_runs import rl_settings, run_rl
from tiny_qwen2 import make_model
from trainer_runs import TIMES

COMMON = dict(updates=2)
RUNS = {
    "stages": dict(schedule="em:1,grpo++", reward="random", updates=3),
    "reference": dict(ref_kl=0.2, learning_rate=1e-3),
    "exact": dict(ref_kl=0.2, kl_estimator="exact", learning_rate=1e-3),
    "truncated": dict(
        top_p=0.7,
        top_k=40,
        reward="random",
        ref_kl=0.1,
        rollout_correction="sequence_tis",
        learning_rate=1e-3,
    ),
    "clip_cov": dict(objective="clip_cov", ratio=0.1, cov_lower=-9.0, cov_upper=9.0),
    "kl_cov": dict(objective="kl_cov", ratio=0.1, micro_batch=2),
    "high_entropy": dict(objective="high_entropy", entropy_target=3.2, predict_change="weights"),
    "repo": dict(objective="repo", repo_zeta=0.04, entropy_target=3.2),
    "entropy, kl_cov": dict(objective="kl_cov", ratio=0.1, advantage_shaping="entropy"),
    "ppl": dict(objective="ppl"),
    "ppl, reference": dict(objective="ppl", ppl_label="reference"),
    "ppl, sampler": dict(objective="ppl", ppl_label="sampler", learning_rate=1e-3),
    "ppl, topk": dict(objective="ppl", ppl_label="topk", ppl_label_k=5, learning_rate=1e-3),
    "eaft": dict(schedule="sft:1,em+eaft", eaft_k=6),
    "opd": dict(schedule="opd:1,em+opd", opd_weight="teacher_entropy"),
}


def numbers(name: str) -> list[dict]:
    teacher = dict(teacher=make_model(5)) if name == "opd" else {}
    lines = run_rl(rl_settings(**{**COMMON, **RUNS[name]}), **teacher).metrics
    return [
        {k: v for k, v in line.items() if isinstance(v, (int, float)) and k not in TIMES}
        for line in lines
    ]


def logged(folder) -> list:
    """What a logger of this rank gets of a run with all of them."""
    with pytest.MonkeyPatch.context() as patch:
        store = put_in(patch, "trackio")
        run_rl(rl_settings(**COMMON, output=folder / "run", log_to="trackio"))
    return [(step, values["loss"]) for rows in store.runs.values() for step, values in rows]


def work(rank: int, folder) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {name: numbers(name) for name in RUNS}
    torch.save({**found, "logged": logged(folder)}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("rl-ranks")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_the_numbers_of_one(ranks, name):
    expected = numbers(name)
    assert ranks[0][name] == ranks[1][name]
    for found, wanted in zip(ranks[0][name], expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-3, abs=2e-5)


def test_the_first_rank_alone_logs_and_writes(ranks, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "rl-ranks0" / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert ranks[0]["logged"] == [(line["update"], line["loss"]) for line in lines]
    assert len(lines) == 2 and ranks[1]["logged"] == []
    assert "(2 processes, " in (folder / "run.yaml").read_text()
