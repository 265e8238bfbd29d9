"""The loss functions of the integration, in transformers.Trainer."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from helpers import error, truth
from small_models import batch, make
from tiny_qwen2 import make_model

import em_kernels
from em_kernels.integrations import _deferred
from em_kernels.integrations.transformers import (
    eaft_loss_func,
    entropy_loss_func,
    remove_em_kernels,
    sft_entropy_loss_func,
)

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21, 22]]


def collate(rows):
    size = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), size, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, :2] = -100
    return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)


def fit(folder, make_loss, *, micro_batch, model=None, **settings):
    """(model, losses of 3 updates of 4 rows each, trainer)."""
    model = make_model() if model is None else model
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=4 // micro_batch,
        max_steps=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    data = [{"input_ids": row} for row in ROWS]
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data,
        compute_loss_func=make_loss(model),
    )
    trainer.train()
    return model, [line["loss"] for line in trainer.state.log_history if "loss" in line], trainer


def plain_loss(nll, entropy, temperature=1.0):
    """The same loss from the model's logits, by the textbook."""

    def make_loss(model):
        def loss(outputs, labels, num_items_in_batch=None):
            target = labels[:, 1:]
            stats = truth(outputs.logits[:, :-1], target.clamp(min=0), temperature=temperature)
            terms = -nll * stats["logprob"] + entropy * stats["entropy"]
            return (terms * (target != -100)).sum() / num_items_in_batch

        return loss

    return make_loss


def plain_eaft(k, alpha):
    """Cross entropy weighted by the entropy of the k largest logits, from the model's logits."""

    def make_loss(model):
        def loss(outputs, labels, num_items_in_batch=None):
            logits, target = outputs.logits[:, :-1].double(), labels[:, 1:]
            log_p = logits.detach().topk(k).values.log_softmax(-1)
            weight = (-(log_p.exp() * log_p).sum(-1) / math.log(k)) ** alpha
            terms = -weight * truth(logits, target.clamp(min=0))["logprob"]
            return (terms * (target != -100)).sum() / num_items_in_batch

        return loss

    return make_loss


LOSSES = {
    "em": (lambda m: entropy_loss_func(m, temperature=0.7), plain_loss(0.0, 1.0, 0.7)),
    "sft": (lambda m: sft_entropy_loss_func(m, entropy_coef=0.3), plain_loss(1.0, 0.3)),
    "nll": (lambda m: sft_entropy_loss_func(m, entropy_coef=0.0), plain_loss(1.0, 0.0)),
    "eaft": (lambda m: eaft_loss_func(m, k=8, alpha=2.0), plain_eaft(8, 2.0)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_trainer_has_the_losses_of_the_textbook_however_the_batch_is_cut(name, tmp_path):
    ours, theirs = LOSSES[name]
    expected, curve, _ = fit(tmp_path, theirs, micro_batch=4)
    for micro_batch in (4, 1):
        model, losses, trainer = fit(tmp_path, ours, micro_batch=micro_batch)
        assert losses == pytest.approx(curve, rel=1e-3)
        for a, b in zip(model.parameters(), expected.parameters()):
            assert error(a, b) < 1e-3
    assert curve[-1] < curve[0]
    scores = trainer.evaluate()
    with torch.no_grad():
        inputs = collate([{"input_ids": row} for row in ROWS])
        labels = inputs.pop("labels")
        want = theirs(model)(model.eval()(**inputs), labels, (labels[:, 1:] != -100).sum())
    assert scores["eval_loss"] == pytest.approx(want.item(), rel=1e-4)


def test_in_train_mode_the_logits_are_left_out_but_not_for_generation():
    model = make_model()
    entropy_loss_func(model)
    inputs = collate([{"input_ids": row} for row in ROWS])
    labels = inputs.pop("labels")
    model.train()
    assert "logits" not in model(**inputs)
    assert model(**inputs, labels=labels).logits is not None
    first = inputs["input_ids"][:1, :3]
    for cache in (True, False):
        answer = model.generate(first, max_new_tokens=3, do_sample=False, use_cache=cache)
        assert answer.shape[0] == 1 and answer.shape[1] > 3
    assert model.eval()(**inputs).logits is not None
    remove_em_kernels(model)
    assert model.train()(**inputs).logits is not None


def test_mixed_precision_reaches_the_loss(tmp_path, monkeypatch):
    def autocast_loss(*args, **kwargs):
        on = torch.is_autocast_enabled("cpu")
        seen.append(torch.get_autocast_dtype("cpu") if on else None)
        return em_kernels.linear_token_loss(*args, **kwargs)

    seen = []
    monkeypatch.setattr(_deferred, "linear_token_loss", autocast_loss)
    _, curve, _ = fit(tmp_path, lambda m: entropy_loss_func(m), micro_batch=4)
    assert set(seen) == {None}
    seen.clear()
    _, losses, _ = fit(tmp_path, lambda m: entropy_loss_func(m), micro_batch=2, bf16=True)
    assert set(seen) == {torch.bfloat16}
    assert losses == pytest.approx(curve, rel=0.05)


def test_what_a_loss_function_refuses():
    model = make("mixtral", torch.float32).train()
    loss = entropy_loss_func(model)
    inputs = batch()
    labels = inputs.pop("labels")
    with pytest.raises(ValueError, match="outputs have an aux_loss"):
        loss(model(**inputs), labels)
    model.config.output_router_logits = False
    assert loss(model(**inputs, output_router_logits=False), labels) > 0
    with pytest.raises(ValueError, match="labels must be in the batch"):
        loss(model(**inputs), None)
    with pytest.raises(ValueError, match="temperature must be positive"):
        entropy_loss_func(model, temperature=0.0)
    with pytest.raises(TypeError, match="entropy_coef must be a number"):
        sft_entropy_loss_func(model, entropy_coef="1")
