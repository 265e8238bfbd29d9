"""A head whose loss is made after the forward: its place in the graph, its cost, its gradient."""

from __future__ import annotations

import pytest
import torch
from helpers import error, product_flops
from tiny_qwen2 import make_model
from torch import nn

from em_kernels import linear_entropy_loss
from em_kernels.integrations.transformers import entropy_loss_func
from em_kernels.lm.heads import ModelError

IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
LABELS = IDS.masked_fill(IDS == 7, -100)
COUNTED = 7  # labels after the first that are not -100


def make():
    model = make_model(tie_word_embeddings=False).double().train()
    return model, entropy_loss_func(model)


def gradients(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def expected() -> torch.Tensor:
    """The gradient of the mean entropy."""
    model = make_model(tie_word_embeddings=False).double().train()
    mask = nn.functional.pad(LABELS[:, 1:] != -100, (0, 1))
    linear_entropy_loss(model.model(IDS).last_hidden_state, model.lm_head.weight, mask).backward()
    return gradients(model)


def leaves(tensor) -> set[torch.Tensor]:
    """The parameters in a tensor's graph."""
    found, queue, seen = set(), [tensor.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found |= {node.variable} if hasattr(node, "variable") else set()
            queue += [following for following, _ in node.next_functions]
    return found


def test_the_head_is_in_the_graph_of_the_forward_and_its_weight_not_in_the_outputs():
    model, loss_func = make()
    out = model(IDS)
    logits, call = out.head_call
    assert logits.shape == (2, 5, 0) and call.hidden.shape == (2, 5, 32)
    assert not call.hidden.requires_grad
    assert leaves(logits) == set(model.parameters())
    loss = loss_func(out, LABELS)
    assert leaves(loss) == set(model.parameters())
    loss.backward()
    assert error(gradients(model), expected()) < 1e-12


def test_the_gradient_costs_no_product_twice():
    model, loss_func = make()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    out, product = model(IDS), 2 * COUNTED * model.lm_head.weight.numel()
    assert product_flops(lambda: loss_func(out, LABELS).backward()) == 2 * product  # logits, dW
    with torch.no_grad():
        assert product_flops(lambda: loss_func(out, LABELS)) == product


def test_several_losses_and_several_backward_passes_add_up():
    model, loss_func = make()
    out = model(IDS)
    loss = loss_func(out, LABELS) + 2 * loss_func(out, LABELS)
    loss.backward(retain_graph=True)
    assert error(gradients(model), 3 * expected()) < 1e-6  # Qwen2's norms round to float32
    (0.5 * loss).backward()
    assert error(gradients(model), 4.5 * expected()) < 1e-6


def test_a_second_derivative_is_refused_and_not_left_out():
    model, loss_func = make()
    loss = loss_func(model(IDS), LABELS)
    with pytest.raises(RuntimeError, match=r"create_graph=True: .* has no derivative"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_without_gradient_there_is_none():
    model, loss_func = make()
    want = loss_func(model(IDS), LABELS).item()
    with torch.no_grad():
        out = model(IDS)
    loss = loss_func(out, LABELS)
    assert not loss.requires_grad and loss.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("items", (None, 0, torch.tensor(0)))
def test_an_update_without_a_token_that_counts_has_loss_and_gradient_zero(training, items):
    model, loss_func = make()
    loss = loss_func(model.train(training)(IDS), torch.full_like(IDS, -100), items)
    loss.backward()
    assert loss.item() == 0
    assert (gradients(model) == 0).all()


def test_a_failed_forward_leaves_nothing_behind():
    model, loss_func = make()
    with pytest.raises(IndexError):
        model(IDS + 1000)
    loss_func(model(IDS), LABELS).backward()
    assert error(gradients(model), expected()) < 1e-12


def test_a_weight_that_is_taken_away_after_the_forward_is_named():
    model, loss_func = make()
    out = model(IDS)
    model.lm_head.weight.untyped_storage().resize_(0)
    model.lm_head.weight = nn.Parameter(torch.empty(0).double())
    with pytest.raises(ModelError, match="FSDP1 and DeepSpeed ZeRO-3 keep it in parts"):
        loss_func(out, LABELS)


def test_the_gradient_of_float16_waits_for_the_loss_scale():
    """Weights of 1e-7: what is made with the loss would be 0 in float16."""
    model = make_model(tie_word_embeddings=False).half().train()
    loss_func, scale = entropy_loss_func(model), 2.0**20
    out = model(IDS)
    hidden = out.head_call[1].hidden.detach().double()
    (scale * loss_func(out, LABELS, 1e7)).backward()
    weight = model.lm_head.weight.detach().double().requires_grad_()
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    counted = nn.functional.pad(LABELS[:, 1:] != -100, (0, 1))
    truth = -(log_p.exp() * log_p).sum(-1)[counted].sum() / 1e7
    (expected,) = torch.autograd.grad(truth, weight)
    assert error(model.lm_head.weight.grad.double() / scale, expected) < 2e-3


@pytest.mark.parametrize("frozen", ((), ("lora_A",), ("lora_B",)))
def test_lora_on_the_head(frozen):
    """The gradient of A and B, and of the adapters below, as through the model's own logits."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(make_model(tie_word_embeddings=False), config).double().train()
    for name, parameter in model.named_parameters():
        if "lm_head" in name and any(part in name for part in frozen):
            parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(IDS).logits[:, :-1]
    mask = LABELS[:, 1:] != -100
    log_p = logits.log_softmax(-1)
    mean = (-(log_p.exp() * log_p).sum(-1) * mask).sum() / mask.sum()
    wanted = torch.autograd.grad(mean, trained)
    loss_func = entropy_loss_func(model)
    for times in (1, 2):
        loss = loss_func(model(IDS), LABELS)
        assert error(loss.detach(), mean.detach()) < 1e-12
        loss.backward()
        for parameter, gradient in zip(trained, wanted, strict=True):
            assert error(parameter.grad, times * gradient) < 1e-9
