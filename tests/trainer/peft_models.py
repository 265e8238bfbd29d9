"""Models with adapters, for the tests of PEFT in the trainer."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen2 import save

from em_kernels.trainer import load_model

peft = pytest.importorskip("peft")


KINDS = {
    "lora": dict(),
    "all linear layers": dict(target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": dict(use_dora=True),
    "biases": dict(bias="all"),
    "dropout": dict(lora_dropout=0.3),
    "embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "head of its own": dict(modules_to_save=["lm_head"]),
    "head and embeddings": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "trainable tokens": dict(trainable_token_indices=[4, 5]),
    "ia3": dict(
        kind=peft.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    ),
    "loha": dict(kind=peft.LoHaConfig(r=2, target_modules=["q_proj"])),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder of a model, as a base of adapters."""
    return save(tmp_path_factory.mktemp("base"))


def adapted(base: str, name: str = "default", seed: int = 0, kind=None, **changes):
    """A PEFT model; the adapter starts as zero."""
    model = load_model(base, "cpu")[0]
    torch.manual_seed(seed)
    config = dict(r=2, target_modules=["q_proj"], lora_dropout=0.0)
    kind = kind or peft.LoraConfig(**{**config, **changes})
    return peft.get_peft_model(model, kind, adapter_name=name)


def native(base: str):
    """A transformers model that an adapter was added to."""
    model = load_model(base, "cpu")[0]
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def trainable(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[2, 5, 20, 6, 3]])).logits
