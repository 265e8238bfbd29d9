"""PEFT's adapters and copies of a head, put on before the model is patched and after."""

from __future__ import annotations

import pytest
import torch
from head_changes import IDS, WHEN, changed, check_right, run_patched
from helpers import error, truth
from tiny_qwen2 import make_model
from torch import nn

from em_kernels import linear_divergence
from em_kernels.integrations.transformers import apply_em_kernels
from em_kernels.lm.heads import ModelError, read_head
from em_kernels.lm.models import hidden_states


def adapted(settings, then=lambda model: None):
    """A change that puts adapters with random weights on the model, and then acts on it."""

    def change(model):
        peft = pytest.importorskip("peft")
        options = dict(r=2, init_lora_weights=False, **settings)
        model = peft.get_peft_model(model, peft.LoraConfig(**options)).double().eval()
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                nn.init.normal_(parameter)
        return then(model) or model

    return change


def other_adapter(model):
    import peft

    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], r=2))
    model.set_adapter("other")


def two_loras(model):
    import peft

    config = peft.LoraConfig(target_modules=["lm_head"], r=3, lora_alpha=7, init_lora_weights=False)
    model.add_adapter("other", config)
    model.double()
    model.base_model.set_adapter(["default", "other"])


def merged_then_disabled(model):
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


ON_HEAD = dict(target_modules=["q_proj", "lm_head"])
COPY = dict(target_modules=["q_proj"], modules_to_save=["lm_head"])
ADAPTED = {
    "modules_to_save": adapted(COPY),
    "modules_to_save, off": adapted(COPY, lambda m: m.base_model.disable_adapter_layers()),
    "modules_to_save of another": adapted(COPY, other_adapter),
    "trainable tokens": adapted(
        dict(target_modules=["q_proj"], trainable_token_indices={"lm_head": [5, 6]})
    ),
    "disabled": adapted(ON_HEAD, lambda model: model.base_model.disable_adapter_layers()),
    "LoRA": adapted(ON_HEAD),
    "rsLoRA": adapted(dict(**ON_HEAD, use_rslora=True, lora_alpha=3)),
    "two LoRAs": adapted(ON_HEAD, two_loras),
    "LoRA with dropout, in eval": adapted(dict(**ON_HEAD, lora_dropout=0.5)),
    "merged": adapted(ON_HEAD, lambda model: model.merge_adapter()),
    "merged, then disabled": adapted(ON_HEAD, merged_then_disabled),
    "merged and unloaded": adapted(ON_HEAD, lambda model: model.merge_and_unload()),
    "another is active": adapted(ON_HEAD, other_adapter),
}


@WHEN
@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_that_are_served(name, when):
    model = changed(ADAPTED[name], when)
    check_right(model)
    if name in ("modules_to_save", "trainable tokens", "another is active", "LoRA", "two LoRAs"):
        with model.disable_adapter():
            check_right(model)
        check_right(model)


@WHEN
@pytest.mark.parametrize("kind", ["IA3Config", "LoHaConfig", "VeraConfig"])
def test_adapters_on_the_head_are_refused(kind, when):
    """At once, though most start as no change at all."""
    peft = pytest.importorskip("peft")
    options = dict(feedforward_modules=[]) if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["lm_head"], **options)
    message = r"is a peft\.tuners\..*Linear, not a plain .*out of target_modules .*or merge"
    with pytest.raises(ModelError, match=message):
        run_patched(changed(lambda model: peft.get_peft_model(model, config).double(), when))


def trained(model):
    model.train()


LORAS = {
    "DoRA": (dict(use_dora=True), lambda model: None, "not plain LoRA but Dora: leave the head"),
    "dropout": (dict(lora_dropout=0.5), trained, "lora_dropout=0.5, which draws other hidden"),
    "hook": (
        {},
        lambda m: m.get_output_embeddings().lora_B.default.register_forward_hook(lambda *a: None),
        "a torch.nn.modules.linear.Linear inside its LoRA is changed or has hooks",
    ),
    "hook below": (
        {},
        lambda m: m.get_output_embeddings().base_layer.register_forward_hook(lambda *a: None),
        "a torch.nn.modules.linear.Linear inside its LoRA is changed or has hooks",
    ),
}


@WHEN
@pytest.mark.parametrize("name", LORAS)
def test_loras_that_are_more_than_a_product_are_refused(name, when):
    settings, act, message = LORAS[name]
    with pytest.raises(ModelError, match=f"has a LoRA that is not served: .*{message}"):
        run_patched(changed(adapted({**ON_HEAD, **settings}, lambda m: act(m) and None), when))


@WHEN
@pytest.mark.parametrize("part", ["target_modules", "modules_to_save"])
def test_a_head_for_every_row_is_refused(part, when):
    """PEFT's adapter_names; a head without adapters is one for all rows."""
    peft = pytest.importorskip("peft")
    plain = dict(target_modules=["q_proj"], init_lora_weights=False)
    on_head = {**plain, part: [*plain.get(part, ()), "lm_head"]}

    def change(model, one, other):
        model = peft.get_peft_model(model, peft.LoraConfig(**one), adapter_name="one")
        model.add_adapter("other", peft.LoraConfig(**other))
        return model.double().eval()

    for names in (["one", "other"], ["other", "other"], ["__base__", "__base__"]):
        model = changed(lambda model: change(model, plain, on_head), when)
        check_right(model)
        with pytest.raises(ModelError, match="adapter_names chooses one for every row: call"):
            model(input_ids=IDS, em_outputs=("entropy",), adapter_names=names)
    model = changed(lambda model: change(model, plain, plain), when)
    for names in (["one", "other"], ["other", "__base__"]):
        with torch.no_grad():
            expected = truth(model(input_ids=IDS, adapter_names=names).logits)["entropy"]
            out = model(input_ids=IDS, em_outputs=("entropy",), adapter_names=names)
        assert error(out.entropy, expected) < 1e-9


@pytest.mark.parametrize("name", ["modules_to_save", "trainable tokens", "LoRA", "two LoRAs"])
def test_what_is_trained_of_the_head_gets_its_gradient(name):
    model = changed(ADAPTED[name], "after")
    inputs = dict(input_ids=IDS, labels=IDS)
    expected = truth(model(input_ids=IDS).logits[:, :-1])["entropy"].sum()
    model(**inputs, em_outputs=("entropy",)).entropy.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    for p, gradient in zip(trained, torch.autograd.grad(expected, trained)):
        assert error(p.grad, gradient) < 1e-8


def test_lora_on_a_head_that_is_tied():
    peft = pytest.importorskip("peft")
    model = make_model(tie_word_embeddings=True).double().eval()
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    model = apply_em_kernels(peft.get_peft_model(model, config).double().eval())
    check_right(model)


def test_lora_of_float32_on_a_bfloat16_head():
    """As PEFT puts it there: its product is in float32, and no copy of the head is."""
    peft = pytest.importorskip("peft")
    model = make_model(tie_word_embeddings=False).bfloat16().eval()
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)
    model = apply_em_kernels(peft.get_peft_model(model, config).eval())
    assert read_head(model).lora[0].dtype == torch.float32
    with torch.no_grad():
        expected = truth(model(input_ids=IDS).logits)["entropy"]
        entropy = model(input_ids=IDS, em_outputs=("entropy",)).entropy
    assert error(entropy, expected) < 1e-2


def test_tied_trainable_tokens_are_in_the_head():
    peft = pytest.importorskip("peft")
    model = apply_em_kernels(make_model(tie_word_embeddings=True).double().eval())
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6])
    model = peft.get_peft_model(model, config).double().eval()
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            nn.init.normal_(parameter)
    check_right(model)


def test_a_lora_head_beside_its_base():
    """The divergence of an adapted head from the one below is that of the models' own logits."""
    model = changed(ADAPTED["LoRA"], "before")
    with torch.no_grad():
        own, logits = read_head(model), model(input_ids=IDS).logits
        hidden = hidden_states(model, IDS, torch.ones_like(IDS))
        with model.disable_adapter():
            base, base_logits = read_head(model), model(input_ids=IDS).logits
            base_hidden = hidden_states(model, IDS, torch.ones_like(IDS))
        pair = dict(hidden=hidden, other_hidden=base_hidden, **own.beside(base))
        found = linear_divergence(**pair, kind="forward_kl")
        log_p, log_q = logits.log_softmax(-1), base_logits.log_softmax(-1)
        first = own.first(5).logits(hidden)
    assert error(found, (log_q.exp() * (log_q - log_p)).sum(-1)) < 1e-9
    assert error(first, logits[..., :5]) < 1e-5
