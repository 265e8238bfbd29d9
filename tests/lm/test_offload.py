"""Activations off the device; here a CPU is taken for one."""

from __future__ import annotations

import copy

import torch
from tiny_qwen2 import make_model

from em_kernels.lm import offload
from em_kernels.lm.models import enable_gradient_checkpointing
from em_kernels.lm.offload import ActivationsOnCPU

IDS = torch.arange(10).view(2, 5) + 4


def test_what_has_a_row_for_every_token_is_moved_and_comes_back(monkeypatch):
    monkeypatch.setattr(offload, "STAY", ())
    moved = []
    own = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (moved.append(x.shape), own(x))[1])
    model = make_model().train()
    enable_gradient_checkpointing(model)
    plain = copy.deepcopy(model)
    plain(input_ids=IDS).logits.sin().sum().backward()
    assert not moved
    with ActivationsOnCPU(IDS, pinned=False):
        loss = model(input_ids=IDS).logits.sin().sum()
    loss.backward()
    assert all(shape[:2] == (2, 5) and len(shape) == 3 for shape in moved)
    assert moved.count((2, 5, 32)) >= 3  # what each layer and the norm were given
    for one, other in zip(model.parameters(), plain.parameters()):
        assert torch.equal(one.grad, other.grad)


def test_nothing_moves_from_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "cpu", None)
    model = make_model()
    with ActivationsOnCPU(IDS):
        loss = model(input_ids=IDS).logits.sum()
    loss.backward()
