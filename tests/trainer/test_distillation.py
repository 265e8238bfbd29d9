"""On-policy distillation in the trainer: against full logits, to its end, resumed, refused."""

from dataclasses import replace

import pytest
import torch
from rl_runs import interrupted_and_resumed, rl_settings, run_rl
from tiny_qwen2 import WORDS, make_model, make_tokenizer, save
from trainer_runs import without_times

from em_kernels.trainer import ModelError, TrainConfig, entropy_update, train
from em_kernels.trainer.distillation import DistillationUpdate


def opd(**changes):
    base = dict(problems=(), prompts=("1 2", "4 5 6"), updates=1)
    base |= {} if "schedule" in changes else dict(objective="opd")
    return rl_settings(**{**base, **changes})


class Steps:
    """The weights, tokens and gradient of every step."""

    def __init__(self, monkeypatch):
        self.weights, self.tokens, self.gradients = [], [], []
        weigh, step = DistillationUpdate.weigh, entropy_update.take_step

        def weigh_and_keep(update, rollout):
            self.tokens.append(weigh(update, rollout))
            state = update.run.model.state_dict()
            self.weights.append({name: value.clone() for name, value in state.items()})
            return self.tokens[-1]

        def take_step(run, *args):
            def keep():
                grads = [p.grad.flatten() for p in run.model.parameters()]
                self.gradients.append(torch.cat(grads))

            inner = run.optimizer.step
            run.optimizer.step = lambda: (keep(), inner())
            try:
                return step(run, *args)
            finally:
                run.optimizer.step = inner

        monkeypatch.setattr(DistillationUpdate, "weigh", weigh_and_keep)
        monkeypatch.setattr(entropy_update, "take_step", take_step)


def log_probabilities(model, tokens, temperature):
    mask = tokens.attention_mask.long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(tokens.input_ids, attention_mask=mask, position_ids=positions).logits
    return (logits.double() / temperature).log_softmax(-1)


def entropy(logp):
    return -(logp.exp() * logp).sum(-1)


def plain(kind, beta, p, q):
    """KL(q || p), KL(p || q), or beta KL(q || m) + (1 - beta) KL(p || m)."""

    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if kind == "js":
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    return kl(q, p) if kind == "forward_kl" else kl(p, q)


CASES = {
    "plain": {},
    "forward": dict(opd_kind="forward_kl", loss_temperature=0.7),
    "js": dict(opd_kind="js", opd_beta=0.3, reduction="sequence_mean"),
    "weighted": dict(opd_weight="teacher_entropy"),
    "with entropy": dict(schedule="em+opd", em_coef=0.4, opd_weight="teacher_entropy"),
    "sums": dict(reduction="sequence_mean_token_sum"),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_full_logits(name, monkeypatch):
    """With a teacher of other sizes than the student."""
    steps, teacher = Steps(monkeypatch), make_model(5, hidden_size=48, num_hidden_layers=1)
    config = opd(**CASES[name], clip=1e9)
    (line,) = run_rl(config, teacher=teacher).metrics
    (tokens,), (weights,), (found,) = steps.tokens, steps.weights, steps.gradients
    student, mask = make_model(), tokens.loss_mask
    student.load_state_dict(weights)
    p = log_probabilities(student, tokens, config.loss_temperature)
    q = log_probabilities(teacher, tokens, config.loss_temperature).detach()
    divergence = plain(config.opd_kind, config.opd_beta, p, q)
    share = mask / mask.sum()
    if config.setting("reduction", "opd") != "token_mean":
        share = mask / mask.any(1).sum()
    if config.reduction == "sequence_mean":
        share = share / mask.sum(1, keepdim=True)
    weight = share
    if config.opd_weight == "teacher_entropy":
        weight = share * entropy(q) / entropy(q)[mask].mean()
    assert line["teacher_entropy"] == pytest.approx(entropy(q)[mask].mean().item(), rel=1e-5)
    loss = (weight * divergence).sum()
    if config.schedule:
        loss = loss + config.em_coef * (share * entropy(p)).sum()
    loss.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in student.parameters()])
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["divergence"] == pytest.approx(divergence[mask].mean().item(), rel=1e-5)
    assert line["mean_entropy"] == pytest.approx(entropy(p)[mask].mean().item(), rel=1e-5)
    assert line["objective"] == (config.schedule or "opd")
    assert "reward_mean" not in line and "entropy_change" not in line


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "js"])
def test_the_student_comes_near_the_teacher(kind):
    config = opd(opd_kind=kind, updates=8, responses=24, learning_rate=5e-3)
    lines = run_rl(config, teacher=make_model(5)).metrics
    assert lines[-1]["divergence"] < 0.5 * lines[0]["divergence"]


@pytest.mark.parametrize("name", CASES)
def test_a_run_does_not_depend_on_the_micro_batches(name):
    runs = []
    for size in (1, 4, 10):
        config = opd(**CASES[name], updates=2, micro_batch=size)
        lines = without_times(run_rl(config, teacher=make_model(5)).metrics)
        assert [line.pop("objective") for line in lines] == [config.schedule or "opd"] * 2
        runs.append(lines)
    for lines in runs[1:]:
        for ours, theirs in zip(lines, runs[0], strict=True):
            assert ours == pytest.approx(theirs, rel=2e-3, abs=2e-5)


def test_a_teacher_that_is_the_student_teaches_nothing():
    (line,) = run_rl(opd(), teacher=make_model()).metrics
    assert abs(line["divergence"]) < 1e-6 and line["grad_norm"] < 1e-5


def test_the_teacher_is_only_read():
    teacher = make_model(5, attention_dropout=0.5).train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run_rl(opd(opd_weight="teacher_entropy"), teacher=teacher)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_named_teacher_is_loaded_and_a_run_is_resumed(dtype, tmp_path):
    teacher = save(tmp_path / "teacher", seed=5)
    config = opd(schedule="em:1,opd", teacher=teacher, updates=4, save_every=2, dtype=dtype)
    whole = run_rl(config)
    if dtype == "float32":
        passed = run_rl(replace(config, teacher=None), teacher=make_model(5))
        assert without_times(passed.metrics) == without_times(whole.metrics)
    assert [line["objective"] for line in whole.metrics] == ["em", "opd", "opd", "opd"]

    resumed = interrupted_and_resumed(config, tmp_path / "run", update=3)
    assert without_times(resumed.metrics) == without_times(whole.metrics)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_heads_may_be_padded_to_different_sizes(larger, monkeypatch):
    """Of both, the entries that both have."""
    steps, more = Steps(monkeypatch), len(WORDS) + 5
    sizes = {larger: dict(vocab_size=more)}
    student = make_model(0, tie_word_embeddings=False, **sizes.get("student", {}))
    teacher = make_model(5, **sizes.get("teacher", {}))
    with torch.no_grad():  # what pads is never drawn
        student.lm_head.weight[len(WORDS) :] = 0
    start = {name: value.clone() for name, value in student.state_dict().items()}
    config = opd(top_k=1, repetition_penalty=1.0)
    (line,) = run_rl(config, student, teacher=(teacher, make_tokenizer())).metrics
    (tokens,) = steps.tokens
    student.load_state_dict(start)
    both = (log_probabilities(m, tokens, 1)[..., : len(WORDS)] for m in (student, teacher))
    p, q = (x.log_softmax(-1) for x in both)
    expected = plain("reverse_kl", None, p, q)[tokens.loss_mask].mean()
    assert line["divergence"] == pytest.approx(expected.item(), rel=1e-5)


def test_what_does_not_fit_is_named(tmp_path):
    teacher = make_model(5)
    with pytest.raises(ValueError, match="teacher must be given for 'opd': a model folder or"):
        run_rl(opd())
    with pytest.raises(ValueError, match="teacher must be passed or named, got both"):
        run_rl(opd(teacher="named"), teacher=teacher)
    with pytest.raises(ValueError, match="teacher is for the objective 'opd', got one for anoth"):
        run_rl(rl_settings(), teacher=teacher)
    with pytest.raises(ValueError, match="teacher is for the objective 'opd'"):
        train(TrainConfig(), make_model(), make_tokenizer(), teacher=teacher)
    with pytest.raises(ValueError, match="teacher must be another model than the one"):
        run_rl(opd(), teacher, teacher=teacher)
    with pytest.raises(ValueError, match=r"teacher: .* of 40 rows against 26, of which the tok"):
        run_rl(opd(), teacher=make_model(vocab_size=40))
    with pytest.raises(ModelError, match="no such folder"):
        run_rl(opd(teacher=str(tmp_path / "nothing")))
    other = make_tokenizer()
    other.add_tokens(["new"])
    message = "teacher: .* must have the vocabulary of the model, got 27 tokens against 26, of wh"
    with pytest.raises(ValueError, match=message):
        run_rl(opd(output=str(tmp_path / "run")), teacher=(teacher, other))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"teacher must be a model or \(model, tokenizer\), got 1"):
        run_rl(opd(), teacher=(teacher,))
    with pytest.raises(ModelError, match=r"teacher: .* has no language-model head"):
        run_rl(opd(), teacher=teacher.model)


def test_a_token_that_the_teacher_does_not_know_is_named():
    student = make_model(vocab_size=len(WORDS) + 400)
    with pytest.raises(ValueError, match=r"teacher: the student drew the token .* with 26 tokens"):
        run_rl(opd(), student, teacher=(make_model(5), make_tokenizer()))


def test_a_run_may_watch_the_skewness_of_the_logits():
    lines = run_rl(opd(stop_skew=1e6, updates=2), teacher=make_model(5)).metrics
    assert all(line["logit_skew"] != 0 for line in lines)
