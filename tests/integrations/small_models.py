"""Small models of every kind that is served, and what their own logits say."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import error, truth
from torch import nn

SMALL = dict(
    vocab_size=37,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)


MODELS = {
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-untied": ("Qwen2", dict(tie_word_embeddings=False)),
    "qwen3": ("Qwen3", {}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "gemma2": ("Gemma2", dict(final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3Text", dict(final_logit_softcapping=4.0)),
    "gemma3-uncapped": ("Gemma3Text", {}),
    "phi": ("Phi", dict(tie_word_embeddings=False)),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", dict(logits_scaling=4.0)),
    "cohere": ("Cohere", dict(logit_scale=0.25)),
    "cohere2": ("Cohere2", dict(logit_scale=0.25)),
    "gpt2": ("GPT2", dict(n_positions=64, n_embd=32, n_layer=2, n_head=2)),
    "mixtral": (
        "Mixtral",
        dict(num_local_experts=4, output_router_logits=True),
    ),  # adds a router's loss
}


EACH_MODEL = pytest.mark.parametrize("name", MODELS)


def make(name: str, dtype: torch.dtype = torch.float64):
    kind, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **changes})
    config._experts_implementation = "eager"  # the others of Mixtral's know no float64
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.to(dtype).eval()


def batch():
    """Two rows, the first padded, with some labels not counted."""
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]])
    labels = ids.clone()
    labels[0, 4:] = -100
    labels[1, 3] = -100
    return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)


def expected_stats(model, inputs, temperature=1.0):
    """(statistics from the model's logits, 0 where there is no label; which positions count)."""
    logits = model(**{**inputs, "labels": None}).logits
    target = torch.cat([inputs["labels"][:, 1:], torch.full((2, 1), -100)], 1)
    counted = target != -100
    stats = truth(logits, target.clamp(min=0), temperature=temperature)
    return {name: value * counted for name, value in stats.items()}, counted


def gradients(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters)]


def check_gradients(ours, theirs, model, tolerance=1e-9):
    pairs = list(zip(gradients(ours, model), gradients(theirs, model)))
    assert sum(b.abs().sum() for _, b in pairs) > 0
    scale = torch.cat([b.flatten() for _, b in pairs])
    assert error(torch.cat([a.flatten() for a, _ in pairs]), scale) < tolerance
