"""Changes of a head, and the check that the statistics are those of the model's own logits."""

from __future__ import annotations

import pytest
import torch
from helpers import error, truth
from tiny_qwen2 import make_model

from em_kernels.integrations.transformers import apply_em_kernels
from em_kernels.lm.head_call import check_head
from em_kernels.lm.heads import read_head
from em_kernels.lm.models import hidden_states
from em_kernels.ops.linear_softmax_stats import linear_softmax_stats

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
WHEN = pytest.mark.parametrize("when", ["before", "after"])


def changed(change, when: str, dtype=torch.float64, **settings):
    """The model after the change, patched before or after it."""
    model = make_model(tie_word_embeddings=False, **settings).to(dtype).eval()
    if when == "after":
        apply_em_kernels(model)
    model = change(model) or model
    return apply_em_kernels(model) if when == "before" else model


def check_right(model, tolerance: float = 1e-9) -> None:
    """Statistics and the trainer's hidden states give what the model's own logits say."""
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
        expected = truth(logits)["entropy"]
        entropy = model(input_ids=IDS, em_outputs=("entropy",)).entropy
        head = read_head(model)
        hidden = hidden_states(model, IDS, torch.ones_like(IDS))
        trained = linear_softmax_stats(hidden, head.weight, **head.arguments).entropy
    assert error(entropy, expected) < tolerance
    assert error(trained, expected) < tolerance
    assert check_head(model).weight.shape[0] == logits.shape[-1]


def on_head(act):
    """A change that calls act(head)."""

    def change(model):
        act(model.lm_head)

    return change


def run_patched(model):
    model(input_ids=IDS, labels=IDS, em_outputs=("entropy",))
