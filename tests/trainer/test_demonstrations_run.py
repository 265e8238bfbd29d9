"""Stages that are given the answers: supervised fine-tuning, plain and weighted by entropy."""

import json
import math

import pytest
import torch
from rl_runs import PROBLEMS, interrupted_and_resumed, plain_log_softmax, rl_settings, run_rl
from tiny_qwen2 import WORDS, make_model, save
from trainer_runs import without_times

from em_kernels import cli
from em_kernels.lm.demonstrations import EncodedDemonstrations, demonstration
from em_kernels.trainer import policy_update
from em_kernels.trainer.collect import turn
from em_kernels.trainer.demonstration_update import DemonstrationUpdate

K = 6


def given(**changes):
    base = dict(updates=1, responses=5, learning_rate=1e-2)
    base |= {} if "schedule" in changes else dict(objective="sft")
    return rl_settings(**{**base, **changes})


def watch(monkeypatch) -> list:
    """(tokens, gradient) of every update"""
    seen, accumulate, weigh = [], policy_update.accumulate_gradients, DemonstrationUpdate.weigh

    def weighed(update, rollout):
        seen.append([weigh(update, rollout)])
        return seen[-1][0]

    def accumulated(run, *args):
        sums = accumulate(run, *args)
        seen[-1].append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
        return sums

    monkeypatch.setattr(DemonstrationUpdate, "weigh", weighed)
    monkeypatch.setattr(policy_update, "accumulate_gradients", accumulated)
    return seen


def textbook(model, tokens, reduction="token_mean", k=None, alpha=1.0, em=0.0):
    """(loss, -log p) in float64"""
    logp, mask = plain_log_softmax(model, tokens), tokens.loss_mask
    nll = -logp.gather(-1, tokens.input_ids.roll(-1, 1)[..., None])[..., 0]
    terms = nll
    if k is not None:
        top = logp.detach().topk(k).values.log_softmax(-1)
        terms = nll * (-(top.exp() * top).sum(-1) / math.log(k)) ** alpha
    terms = (terms - em * (logp.exp() * logp).sum(-1)) * mask
    if reduction == "token_mean":
        return terms.sum() / mask.sum(), nll[mask].mean()
    per_answer = terms.sum(1) / (mask.sum(1) if reduction == "sequence_mean" else 1)
    return per_answer.mean(), nll[mask].mean()


CASES = {
    "sft": (dict(), dict()),
    "sft, by answers": (dict(reduction="sequence_mean"), dict(reduction="sequence_mean")),
    "sft, sums": (dict(reduction="sequence_mean_token_sum"), dict(reduction="sum")),
    "eaft": (dict(objective="eaft", eaft_k=K, eaft_alpha=0.5), dict(k=K, alpha=0.5)),
    "eaft, alpha 0": (dict(objective="eaft", eaft_alpha=0.0), dict()),
    "em+sft": (dict(schedule="em+sft", em_coef=0.3), dict(em=0.3)),
    "em+eaft": (dict(schedule="em+eaft", eaft_k=K, em_coef=0.3), dict(k=K, em=0.3)),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_textbooks(name, monkeypatch):
    changes, wanted = CASES[name]
    seen = watch(monkeypatch)
    (line,) = run_rl(given(**changes)).metrics
    ((tokens, found),) = seen
    model = make_model()
    loss, nll = textbook(model, tokens, **wanted)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["nll"] == pytest.approx(nll.item(), rel=1e-4)
    assert ("eaft_weight" in line) == ("eaft" in name)


def test_only_completions_count_and_metrics_are_of_them(monkeypatch):
    seen = watch(monkeypatch)
    (line,) = run_rl(given(objective="eaft", eaft_k=K, stop_skew=1e9)).metrics
    tokens = seen[0][0]
    end = WORDS.index("<eos>")
    for ids, mask in zip(tokens.input_ids.roll(-1, 1), tokens.loss_mask):
        assert ids[mask].tolist()[-1] == end and len(ids[mask]) == 2  # an answer of one letter
    assert line["response_tokens"] == 10 and line["response_length"] == 2
    assert line["truncated"] == 0 and line["step"] == 1 and "logit_skew" in line
    assert 0 <= line["token_accuracy"] <= 1 and 0 < line["eaft_weight"] < 1
    logp = plain_log_softmax(make_model(), tokens)[tokens.loss_mask]
    entropy = -(logp.exp() * logp).sum(-1).mean()
    assert line["mean_entropy"] == pytest.approx(entropy.item(), rel=1e-4)
    right = logp.argmax(-1) == tokens.input_ids.roll(-1, 1)[tokens.loss_mask]
    assert line["token_accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.parametrize("changes", [dict(), dict(schedule="em+eaft", eaft_k=K)])
def test_a_run_does_not_depend_on_the_micro_batches(changes):
    def numbers(size):
        (first, second) = run_rl(given(**changes, updates=2, micro_batch=size)).metrics
        names = [name for name, value in second.items() if isinstance(value, (int, float))]
        lines = without_times([first, second])
        return [line[name] for line in lines for name in names if name in line]

    expected = numbers(5)
    for size in (1, 2):
        assert numbers(size) == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_demonstrations_are_learned():
    lines = run_rl(given(updates=25, responses=3)).metrics
    assert lines[-1]["nll"] < 0.1 * lines[0]["nll"]
    assert lines[-1]["token_accuracy"] == 1


def test_all_take_turns_from_the_start_of_a_stage(monkeypatch):
    asked, rollout = [], EncodedDemonstrations.rollout

    def asking(encoded, numbers):
        asked.append(list(numbers))
        return rollout(encoded, numbers)

    monkeypatch.setattr(EncodedDemonstrations, "rollout", asking)
    run_rl(given(schedule="sft:3,eaft", eaft_k=K, updates=5, responses=2, seed=3))
    first = [number for numbers in asked[:3] for number in numbers]
    assert sorted(first[:3]) == sorted(first[3:]) == [0, 1, 2]
    assert asked[3:] == asked[:2]
    assert first == [turn(3, i, 3) for i in range(6)]


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(tmp_path):
    config = given(schedule="sft:2,em+eaft", eaft_k=K, updates=4, save_every=3, seed=1)
    whole = run_rl(config)

    resumed = interrupted_and_resumed(config, tmp_path / "run", update=4)
    assert without_times(resumed.metrics) == without_times(whole.metrics)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)


def write(folder, *rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_file_of_problems_serves_demonstrations_and_rewards(tmp_path):
    rows = [{"problem": a, "answer": b, "solution": f"{a} {b}"} for a, b in PROBLEMS]
    problems = write(tmp_path, *rows)
    config = given(
        schedule="sft:1,grpo", problems=problems, updates=2, template="{problem}#", reward=None
    )
    assert config.demonstrations[0] == demonstration("1 2#", "1 2 3")
    assert config.prompt_texts[0] == "1 2#" and config.tasks[0].answer == "3"
    named = given(problems=problems, solution_field="answer")
    assert named.demonstrations[1] == demonstration("4 5 6", "7")
    assert [line["objective"] for line in run_rl(config).metrics] == ["sft", "grpo"]


def test_a_file_of_chats_by_the_command_line(tmp_path, capsys):
    chat = [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]
    problems = write(tmp_path, {"messages": chat}, {"messages": chat[:1] + chat})
    model, output = save(tmp_path / "model"), str(tmp_path / "run")
    words = f"train --model {model} --output {output} --problems {problems} --objective eaft"
    words += " --eaft-k 5 --updates 1 --responses 2 --quiet --device cpu"
    assert cli.main(words.split()) == 0, capsys.readouterr().err
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["objective"] == "eaft" and line["response_tokens"] == 4
    assert cli.main([*words.split(), "--top-p", "0.9"]) == 2
    assert "--top-p is for objectives that sample, got 0.9 for 'eaft'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(problems=(), prompts=("1",)), "problems must be given for 'sft', got none"),
        (dict(prompts=("1",)), r"prompts is for the objectives 'em' and 'opd', got \('1',\) for"),
        (dict(problems=(("1", None),)), "problems need answers, which are the demonstrations of"),
        (dict(solution_field="x"), "solution_field must be None where problems are pairs"),
        (dict(problems="x.jsonl", answer_field="a"), "answer_field is for problems that are asked"),
        (
            dict(objective="grpo", solution_field="x", problems="x.jsonl"),
            "solution_field is for demonstrations",
        ),
        (dict(eaft_alpha=2.0), "eaft_alpha is for the objective 'eaft', got 2.0 for 'sft'"),
        (dict(objective="eaft", eaft_k=1), "eaft_k must be 2 or more, got 1"),
        (dict(sampling_temperature=0.5), "sampling_temperature is for objectives that sample, go"),
        (dict(group_size=4), "group_size is for objectives with rewards, got 4 for 'sft'"),
        (dict(entropy_target=1.0), "entropy_target is for objectives with rewards, got 1.0 for"),
        (dict(schedule="sft+em"), "objective must be one of|two objectives at once are em.NAME"),
    ],
)
def test_bad_settings_are_named(changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"problem": "1", "solution": "2"})
    (tmp_path / "rows.jsonl").rename(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=message):
        given(**changes)


def test_demonstrations_that_are_cut_are_counted():
    problems = (("1", "2"), ("3", "456789"))
    with pytest.warns(UserWarning, match="1 of 2 demonstrations are longer than 4 tokens and are"):
        (line,) = run_rl(given(problems=problems, responses=2, max_new_tokens=4)).metrics
    assert line["truncated"] == 0.5 and line["response_tokens"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective="eaft", eaft_k=27), "eaft_k must be at most 26, the entries of the mod"),
        (dict(problems=(("1" * 80, "2"),)), "prompt must be shorter than the model's 64 positions"),
    ],
)
def test_what_the_model_has_no_room_for_is_refused_before_anything_is_written(
    changes, message, tmp_path
):
    with pytest.raises(ValueError, match=message):
        run_rl(given(**changes, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
