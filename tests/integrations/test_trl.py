"""TRL's trainers with and without the switch: the same losses, entropies and weights."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import error, random_logits, random_target, truth

from em_kernels import tiny_math
from em_kernels.trainer import load_model

trl = pytest.importorskip("trl", minversion="1.16", exc_type=ImportError)
datasets = pytest.importorskip("datasets")
integration = pytest.importorskip("em_kernels.integrations.trl", exc_type=ImportError)
from trl.trainer import utils as trl_utils  # noqa: E402

PROMPTS = [problem.text for problem in tiny_math.make_problems("dev", 6)]
SHARED = dict(
    per_device_train_batch_size=4,
    max_steps=3,
    learning_rate=1e-4,
    lr_scheduler_type="constant",
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
    bf16=False,
    seed=3,
)
SAMPLED = dict(num_generations=4, max_completion_length=12, beta=0.02, temperature=0.9)
COMPARED = ("loss", "entropy", "grad_norm", "reward", "kl", "mean_token_accuracy")


@pytest.fixture(autouse=True)
def _trl_is_left_as_it_was():
    yield
    assert not integration.is_applied()


def digits(completions, **_):
    """A reward with some spread: how many digits an answer has."""
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def chat(text):
    return f"<|user|>{text}<|assistant|>"


def grpo(model, tokenizer, folder, **settings):
    arguments = trl.GRPOConfig(output_dir=folder, **{**SHARED, **SAMPLED, **settings})
    data = datasets.Dataset.from_dict({"prompt": [chat(p) for p in PROMPTS]})
    return trl.GRPOTrainer(
        model, digits, args=arguments, train_dataset=data, processing_class=tokenizer
    )


def rloo(model, tokenizer, folder, **settings):
    arguments = trl.RLOOConfig(output_dir=folder, **{**SHARED, **SAMPLED, **settings})
    data = datasets.Dataset.from_dict({"prompt": [chat(p) for p in PROMPTS]})
    return trl.RLOOTrainer(
        model, digits, args=arguments, train_dataset=data, processing_class=tokenizer
    )


def sft(model, tokenizer, folder, **settings):
    problems = tiny_math.make_problems("dev", 12)
    rows = [{"prompt": chat(p.text), "completion": str(p.answer)} for p in problems]
    arguments = trl.SFTConfig(output_dir=folder, max_length=64, **{**SHARED, **settings})
    return trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def dpo(model, tokenizer, folder, **settings):
    problems = tiny_math.make_problems("dev", 12)
    rows = [
        {"prompt": chat(p.text), "chosen": str(p.answer), "rejected": str(p.answer + 1)}
        for p in problems
    ]
    arguments = trl.DPOConfig(output_dir=folder, max_length=64, **{**SHARED, **settings})
    data = datasets.Dataset.from_list(rows)
    return trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)


def train(make, folder, **settings):
    """(lines of the log, trained model, model before)."""
    model, tokenizer = load_model(str(tiny_math.model_path()), "cpu")
    trainer = make(model, tokenizer, str(folder), **settings)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    return lines, trainer.model


def compare(ours, theirs, tolerance=2e-4):
    """Logged numbers, and how far the weights have moved."""
    for mine, other in zip(ours[0], theirs[0]):
        for name in set(COMPARED) & set(other):
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    before = load_model(str(tiny_math.model_path()), "cpu")[0].state_dict()
    moved = 0.0
    for name, weight in theirs[1].state_dict().items():
        step = weight - before[name]
        moved += step.abs().sum().item()
        difference = ours[1].state_dict()[name] - weight
        assert difference.norm() <= 0.02 * step.norm() + 1e-7, name
    assert moved > 1


CASES = {
    "grpo": (grpo, {}),
    "grpo with entropy bonus and off-policy steps": (
        grpo,
        dict(entropy_coef=0.01, num_iterations=2, top_entropy_quantile=0.5),
    ),
    "rloo": (rloo, {}),
    "dpo": (dpo, {}),
    "sft": (sft, dict(completion_only_loss=True)),
    "sft on all tokens, dft": (sft, dict(loss_type="dft", completion_only_loss=False)),
}


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_those_of_trl(case, tmp_path, monkeypatch):
    make, settings = CASES[case]
    theirs = train(make, tmp_path, **settings)
    tokens = []
    linear = integration.linear_softmax_stats

    def spy(hidden, *args, **kwargs):
        tokens.append(len(hidden))
        return linear(hidden, *args, **kwargs)

    monkeypatch.setattr(integration, "linear_softmax_stats", spy)
    with integration.patched():
        ours = train(make, tmp_path, **settings)
    assert len(tokens) >= 3 and all(tokens)
    if make is grpo:
        assert max(tokens) <= 4 * 12  # the prompts are not scored
    compare(ours, theirs)


def test_every_statistic_of_the_fused_head_is_trls():
    torch.manual_seed(0)
    hidden = torch.randn(9, 16, requires_grad=True)
    weight = torch.randn(53, 16, requires_grad=True)
    bias = torch.randn(53, requires_grad=True)
    arguments = (hidden, weight, bias, random_target(9, vocab=53), 0.8, 20, 5.0, 0.5)
    theirs = trl.kernels.ChunkedLogProbFunction.apply(*arguments)
    with integration.patched():
        ours = trl.kernels.ChunkedLogProbFunction.apply(*arguments)
        some = trl.kernels.ChunkedLogProbFunction.apply(*arguments, ("entropy",))
    assert [x is None for x in some] == [False, False, True, True, True]
    for a, b in zip(ours[:4], theirs[:4]):
        assert error(a, b) < 1e-5
    assert torch.equal(ours[4], theirs[4])
    upstream = torch.randn(2, 9)
    grads = [
        torch.autograd.grad((upstream[0] * x[0] + upstream[1] * x[1]).sum(), (hidden, weight, bias))
        for x in (ours, theirs)
    ]
    for a, b in zip(*grads):
        assert error(a, b) < 1e-5


def test_targets_outside_the_vocabulary_are_answered_as_by_trl():
    hidden, weight = torch.randn(6, 16).requires_grad_(), torch.randn(53, 16).requires_grad_()
    targets = torch.tensor([-100, 4, -1, 53, 1 << 40, 52])
    arguments = (hidden, weight, None, targets, 0.8, 20, 5.0, 0.5)
    theirs = trl.kernels.ChunkedLogProbFunction.apply(*arguments)
    ours = integration.chunked_log_probs(*arguments)
    for a, b in zip(ours[:4], theirs[:4]):
        assert error(a, b) < 1e-5
    upstream = torch.randn(2, 6)
    for a, b in zip(
        *(
            torch.autograd.grad((upstream[0] * x[0] + upstream[1] * x[1]).sum(), (hidden, weight))
            for x in (ours, theirs)
        )
    ):
        assert error(a, b) < 1e-5
    assert not ours[4][[0, 2, 3, 4]].any()


@pytest.mark.parametrize("dtype", (torch.int32, torch.uint8))
def test_targets_of_any_integer_dtype(dtype):
    hidden, weight, targets = (
        torch.randn(5, 16),
        torch.randn(53, 16),
        torch.tensor([4, 0, 52, 9, 9]),
    )
    logits = hidden @ weight.T
    calls = (
        lambda y: integration.chunked_log_probs(hidden, weight, None, y, 0.8, 20)[0],
        lambda y: trl_utils.selective_log_softmax(logits, y, 0.8),
        lambda y: trl_utils.selective_log_softmax_and_entropy(logits, y, temperature=0.8)[0],
    )
    with integration.patched():
        for call in calls:
            assert torch.equal(call(targets.to(dtype)), call(targets))


@pytest.mark.parametrize("cast", (False, True))
def test_the_fused_head_in_bfloat16(cast):
    model = load_model(str(tiny_math.model_path()), "cpu", torch.bfloat16)[0]
    if cast:
        model.lm_head.float()
    trl_utils.add_fused_lm_head(
        model, 0.9, cast_lm_head_to_fp32=cast, outputs=("log_probs", "entropy")
    )
    ids = random_target(2, 7, vocab=400)
    labels = ids.masked_fill(ids % 3 == 0, -100)
    theirs = model(ids, labels=labels, fused_lm_head=True)
    with integration.patched():
        ours = model(ids, labels=labels, fused_lm_head=True)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    for name in ("log_probs", "entropy", "loss"):
        assert error(getattr(ours, name), getattr(theirs, name)) < (1e-4 if cast else 2e-2), name


def test_functions_of_logits_are_replaced_wherever_they_are_imported():
    late = type(sys)("trl.late")
    names = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy")
    before = [getattr(trl_utils, name) for name in names]
    for name, function in zip(names, before):
        setattr(late, name, function)
    x, index = random_logits(3, 5, 41), random_target(3, 5, vocab=41)
    mask = torch.rand(3, 5) > 0.3
    sys.modules["trl.late"] = late
    try:
        with integration.patched():
            assert integration.is_applied()
            with integration.patched():
                pass
            assert integration.is_applied()
            assert all(getattr(late, name) is not f for name, f in zip(names, before))
            expected = truth(x, index, temperature=0.7)
            got = late.selective_log_softmax(x, index, 0.7, mask)
            assert error(got, expected["logprob"] * mask) < 1e-6
            assert error(late.entropy_from_logits(x, chunk_size=2), truth(x)["entropy"]) < 1e-6
            x.requires_grad_()
            logprob, entropy = late.selective_log_softmax_and_entropy(x, index, False, 0.7, mask)
            assert error(entropy, expected["entropy"] * mask) < 1e-6
            assert logprob.requires_grad and not entropy.requires_grad
            several = torch.stack([index, index + 1], -1).clamp(max=40)
            want = before[0](x, several)
            assert torch.equal(late.selective_log_softmax(x, several), want)
            sharp = torch.tensor([[25.0, 0.0, 0.0]])
            exact = truth(sharp)["entropy"]
            assert error(late.entropy_from_logits(sharp), exact) < 1e-6
        assert [getattr(late, name) for name in names] == before
        assert [getattr(trl_utils, name) for name in names] == before
    finally:
        del sys.modules["trl.late"]
    integration.remove_from_trl()  # a second time does nothing


def test_a_weight_that_deepspeed_gathers_is_left_to_trl():
    hidden, weight = torch.randn(4, 8), torch.randn(11, 8)
    target = random_target(4, vocab=11)
    theirs = trl.kernels.ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 11)
    weight.ds_id = 1
    with integration.patched():
        ours = trl.kernels.ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 11)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_logits_dtype_reaches_the_head_and_is_what_it_was_after_a_block():
    hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(301, 32).bfloat16()
    target = random_target(64, vocab=301)
    exact = truth(hidden.double() @ weight.double().T, target)

    def errors():
        log_probs, entropy, *_ = trl.kernels.ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, 128
        )
        return error(log_probs, exact["logprob"]), error(entropy, exact["entropy"])

    with integration.patched():
        rounded = errors()
        assert min(rounded) > 1e-4
        integration.apply_to_trl(logits_dtype=torch.float32)
        assert max(errors()) < 1e-5
        with integration.patched(logits_dtype=torch.bfloat16):
            assert errors() == rounded
        assert max(errors()) < 1e-5
    with integration.patched():
        assert errors() == rounded


@pytest.mark.parametrize("value", ("float32", torch.int64))
def test_a_bad_logits_dtype_raises_at_the_switch(value):
    for switch in (integration.apply_to_trl, lambda **kw: integration.patched(**kw).__enter__()):
        with pytest.raises((TypeError, ValueError), match="logits_dtype must be"):
            switch(logits_dtype=value)
    assert not integration.is_applied()


@pytest.mark.parametrize("tokens", (0, 1, 6))
@pytest.mark.parametrize("temperature", (0.7, torch.tensor(0.7)))
def test_the_fused_head_on_few_tokens(tokens, temperature):
    hidden = torch.randn(16, tokens).T.requires_grad_()  # not contiguous
    weight = torch.randn(53, 16, requires_grad=True)
    arguments = (hidden, weight, None, random_target(tokens, vocab=53), temperature, 20)
    theirs = trl.kernels.ChunkedLogProbFunction.apply(*arguments)
    with integration.patched():
        ours = trl.kernels.ChunkedLogProbFunction.apply(*arguments)
    grads = []
    for results in (ours, theirs):
        grads.append(torch.autograd.grad((results[0] + results[1]).sum(), (hidden, weight)))
    for a, b in zip((*ours[:4], *grads[0]), (*theirs[:4], *grads[1])):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_batch_without_a_label_trains_on():
    """The loss is 0 and stays connected to the model."""
    model = load_model(str(tiny_math.model_path()), "cpu")[0]
    trl_utils.add_fused_lm_head(model, 0.9, outputs=("log_probs", "entropy"))
    ids = random_target(2, 5, vocab=400)
    with integration.patched():
        outputs = model(ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert outputs.loss == 0 and not outputs.label_mask.any()
    outputs.loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("temperature", (0.7, torch.tensor(0.7)))
def test_functions_of_logits_on_views_and_with_numbers_as_masks(dtype, temperature):
    logits = random_logits(41, 4, 3).permute(2, 1, 0).to(dtype)
    index, mask = random_target(3, 4, vocab=41), torch.tensor([1, 0, 2, 1]).expand(3, 4)
    digits = 1e-5 if dtype == torch.float32 else 2e-2
    names = ("selective_log_softmax", "selective_log_softmax_and_entropy")
    theirs = [getattr(trl_utils, name) for name in names]
    expected = theirs[0](logits, index, temperature, mask)
    both = theirs[1](logits, index, True, temperature, mask)
    with integration.patched():
        got = trl_utils.selective_log_softmax(logits, index, temperature, mask)
        ours = trl_utils.selective_log_softmax_and_entropy(logits, index, True, temperature, mask)
    for a, b in zip((got, *ours), (expected, *both)):
        assert a.shape == b.shape and error(a, b.to(a.dtype)) < digits
