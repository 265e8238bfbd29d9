"""apply_em_kernels: the model's own logits say what every statistic, loss and gradient must be."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import transformers
from helpers import error, truth
from small_models import EACH_MODEL, SMALL, batch, check_gradients, expected_stats, gradients, make
from torch import nn

import em_kernels
from em_kernels.integrations.transformers import (
    TokenStatsOutput,
    apply_em_kernels,
    remove_em_kernels,
)
from em_kernels.lm.heads import ModelError
from em_kernels.lm.models import enable_gradient_checkpointing


@EACH_MODEL
def test_statistics_loss_and_gradients_are_those_of_the_models_logits(name):
    model = make(name)
    inputs = batch()
    expected, counted = expected_stats(model, inputs)
    own = model(**inputs)
    apply_em_kernels(model)
    out = model(**inputs, em_outputs=("logprob", "entropy", "varentropy", "is_top1"))
    assert isinstance(out, TokenStatsOutput) and "logits" not in out
    for field in ("logprob", "entropy", "varentropy"):
        assert error(getattr(out, field), expected[field]) < 1e-9, field
    assert torch.equal(out.is_top1, expected["is_top1"].bool())
    assert out.loss.item() == pytest.approx(own.loss.item(), rel=1e-6)  # theirs is in float32
    loss = -expected["logprob"].sum() / counted.sum()
    if own.get("aux_loss") is not None:
        assert own.aux_loss > 0 and torch.equal(out.aux_loss, own.aux_loss)
        loss = loss + model.router_aux_loss_coef * own.aux_loss
    check_gradients(out.loss, loss, model, 1e-6 if name == "mixtral" else 1e-9)  # routes in float32
    upstream = torch.randn(2, 2, 6, dtype=torch.float64)
    ours = (upstream[0] * out.logprob + upstream[1] * out.entropy).sum()
    theirs = (upstream[0] * expected["logprob"] + upstream[1] * expected["entropy"]).sum()
    check_gradients(ours, theirs, model)


@EACH_MODEL
def test_without_em_outputs_the_model_is_as_before(name):
    model = make(name)
    model.config.output_router_logits = False  # Mixtral cannot generate with it
    inputs = batch()
    signature = inspect.signature(model.forward)
    before = model(**inputs)
    prompt = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    apply_em_kernels(model)
    for _ in range(2):
        after = model(**inputs)
        assert type(after) is type(before)
        assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
        assert torch.equal(model.generate(**prompt, max_new_tokens=4, do_sample=False), answer)
        assert inspect.signature(model.forward) == signature
        if "_em_kernels" in model.__dict__:
            remove_em_kernels(model)
    assert "forward" not in model.__dict__


def test_positions_without_a_label_are_exact_zeros():
    model = apply_em_kernels(make("qwen2"))
    inputs = batch()
    _, counted = expected_stats(model, inputs)
    out = model(**inputs, em_outputs=("logprob", "entropy"))
    assert out.logprob.shape == out.entropy.shape == inputs["input_ids"].shape
    assert (out.logprob[~counted] == 0).all() and (out.entropy[~counted] == 0).all()
    assert (out.entropy[counted] > 0).all()
    assert out.em == em_kernels.TokenStats(logprob=out.logprob, entropy=out.entropy)


def test_without_labels_every_attended_position_has_an_entropy():
    model = apply_em_kernels(make("qwen2"))
    inputs = batch()
    del inputs["labels"]
    expected = truth(model(**inputs).logits)["entropy"] * inputs["attention_mask"]
    out = model(**inputs, em_outputs=("entropy",))
    assert out.loss is None and out.logprob is None
    assert error(out.entropy, expected) < 1e-9
    assert (out.entropy[0, 4:] == 0).all() and (out.entropy[1] > 0).all()


def test_shifted_labels_temperature_and_number_of_items():
    model = apply_em_kernels(make("gemma2"))
    inputs = batch()
    shifted = torch.cat([inputs["labels"][:, 1:], torch.full((2, 1), -100)], 1)
    expected, counted = expected_stats(model, inputs, temperature=0.7)
    inputs["shift_labels"] = shifted
    out = model(**inputs, em_outputs=("entropy",), em_temperature=0.7, num_items_in_batch=40)
    assert error(out.entropy, expected["entropy"]) < 1e-9 and out.logprob is None
    assert out.loss.item() == pytest.approx(-expected["logprob"].sum().item() / 40)
    assert counted.sum() != 40


def test_hidden_states_and_cache_are_still_there_when_asked_for():
    model = apply_em_kernels(make("qwen2"))
    inputs = batch()
    plain = model(**inputs, output_hidden_states=True, use_cache=True)
    out = model(**inputs, em_outputs=("entropy",), output_hidden_states=True, use_cache=True)
    assert torch.equal(out.hidden_states[-1], plain.hidden_states[-1])
    assert out.past_key_values.get_seq_length() == 6
    assert model(**inputs, em_outputs=("entropy",)).past_key_values is None


def test_logits_are_never_made(monkeypatch):
    model = make("llama", torch.float32)
    sizes = []
    original = nn.functional.linear
    monkeypatch.setattr(
        nn.functional, "linear", lambda *a, **k: sizes.append(a[1].shape[0]) or original(*a, **k)
    )
    model(**batch())
    assert SMALL["vocab_size"] in sizes
    apply_em_kernels(model)
    sizes.clear()
    model(**batch(), em_outputs=("logprob", "entropy")).loss.backward()
    assert sizes and SMALL["vocab_size"] not in sizes


def test_under_autocast_the_products_are_those_of_the_models_head():
    model = apply_em_kernels(make("qwen2", torch.float32))
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = expected_stats(model, inputs)
        out = model(**inputs, em_outputs=("logprob", "entropy"))
    assert error(out.logprob, expected["logprob"]) < 1e-2
    assert error(out.entropy, expected["entropy"]) < 1e-2


def test_gradient_checkpointing_changes_nothing():
    model = apply_em_kernels(make("qwen3")).train()
    grads = []
    for _ in range(2):
        out = model(**batch(), em_outputs=("entropy",))
        grads.append(gradients(out.entropy.sum(), model))
        enable_gradient_checkpointing(model)
    for a, b in zip(*grads):
        assert error(a, b) < 1e-9 or b.norm() == 0


def test_torch_compile_compiles_the_backbone_once():
    model = apply_em_kernels(make("qwen2"))
    expected = model(**batch(), em_outputs=("logprob", "entropy"))
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    counts = []
    for _ in range(3):
        out = compiled(**batch(), em_outputs=("logprob", "entropy"))
        assert error(out.logprob, expected.logprob) < 1e-9
        assert error(out.entropy, expected.entropy) < 1e-9
        counts.append(len(graphs))
    assert 0 < counts[0] == counts[1] == counts[2]


def test_a_copy_of_a_patched_model_stands_alone():
    model = apply_em_kernels(make("qwen2"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
    inputs = batch()
    expected, _ = expected_stats(twin, inputs)
    assert error(twin(**inputs, em_outputs=("entropy",)).entropy, expected["entropy"]) < 1e-9
    remove_em_kernels(twin)
    assert model(**inputs, em_outputs=("entropy",)).entropy is not None
    assert model.state_dict().keys() == twin.state_dict().keys()


class LoRA(nn.Module):
    """W x + B A x with W frozen."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(0.3 * torch.randn(rank, layer.in_features).double())
        self.b = nn.Parameter(0.3 * torch.randn(layer.out_features, rank).double())

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


def test_adapters_on_the_backbone_of_a_frozen_model():
    model = make("llama").requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
    inputs = batch()
    expected, _ = expected_stats(model, inputs)
    out = apply_em_kernels(model)(**inputs, em_outputs=("entropy",))
    check_gradients(out.entropy.sum(), expected["entropy"].sum(), model)
    assert model.lm_head.weight.grad is None


def test_peft():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "lm_head"]
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    model = peft.get_peft_model(make("llama"), config).double().eval()
    inputs = batch()
    expected, _ = expected_stats(model, inputs)
    assert apply_em_kernels(model) is model
    out = model(**inputs, em_outputs=("logprob", "entropy"))
    assert error(out.logprob, expected["logprob"]) < 1e-9
    check_gradients(out.entropy.sum(), expected["entropy"].sum(), model)
    remove_em_kernels(model)
    config = peft.LoHaConfig(target_modules=["lm_head"], r=2)
    with pytest.raises(ModelError, match=r"is a peft\.tuners\.loha\.layer\.Linear, not a plain"):
        apply_em_kernels(peft.get_peft_model(make("llama"), config))


# What is refused


def test_models_that_cannot_be_served_are_refused_with_the_reason():
    model = make("qwen2")
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
    with pytest.raises(ModelError, match=r"logits of Qwen2ForCausalLM are not softcap"):
        apply_em_kernels(model)
    handle.remove()
    apply_em_kernels(model)
    model = make("gemma2")
    model.config.final_logit_softcapping = None
    capped = model.forward
    model.forward = lambda **inputs: _cap(capped(**inputs))
    with pytest.raises(ModelError, match=r"with softcap None and scale 1 from its config"):
        apply_em_kernels(model)
    with pytest.raises(ModelError, match="Qwen2Model has no language-model head"):
        apply_em_kernels(make("qwen2").model)
    t5 = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration has an encoder"):
        apply_em_kernels(transformers.T5ForConditionalGeneration(t5))
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        apply_em_kernels(nn.Linear(2, 2))


def _cap(outputs):
    outputs.logits = outputs.logits.tanh()
    return outputs


def test_calls_that_make_no_sense_are_refused():
    model = apply_em_kernels(make("qwen2"))
    inputs = batch()
    with pytest.raises(TypeError, match="em_outputs must be a tuple of names, got the string"):
        model(**inputs, em_outputs="entropy")
    with pytest.raises(TypeError, match="em_outputs must be a tuple of names, got int"):
        model(**inputs, em_outputs=3)
    with pytest.raises(ValueError, match=r"em_outputs must be among .*got 'perplexity'"):
        model(**inputs, em_outputs=("perplexity",))
    # transformers would take it for its own, and ignore it.
    for given in (dict(em_outputs=("entropy",), em_entropy_require_grad=False), dict(em_output=())):
        with pytest.raises(TypeError, match=f"a patched model takes em_.*, got {[*given][-1]}$"):
            model(**inputs, **given)
    with pytest.raises(ValueError, match="em_outputs: 'logprob' needs labels, got labels=None"):
        model(inputs["input_ids"], em_outputs=(name for name in ("logprob", "entropy")))
    with pytest.raises(ValueError, match="logits_to_keep cannot be combined"):
        model(**inputs, em_outputs=("entropy",), logits_to_keep=2)
    with pytest.raises(TypeError, match="must be passed by name"):
        model(inputs["input_ids"], inputs["attention_mask"], em_outputs=("entropy",))


def test_patches_are_undone_in_order():
    model = make("qwen2")
    with pytest.raises(ValueError, match="not patched by apply_em_kernels"):
        remove_em_kernels(model)
    apply_em_kernels(model)
    assert apply_em_kernels(model) is model
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    with pytest.raises(ValueError, match="patched again after apply_em_kernels"):
        remove_em_kernels(model)
    model.forward = ours
    remove_em_kernels(model)
    earlier = model.forward
    model.forward = lambda *args, **kwargs: earlier(*args, **kwargs)
    own = model.forward
    remove_em_kernels(apply_em_kernels(model))
    assert model.forward is own
