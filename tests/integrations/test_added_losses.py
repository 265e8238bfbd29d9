"""What a model adds to its loss, routers above all, is added to that of a patched one."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import error
from tiny_qwen2 import make_model
from torch import nn

from em_kernels.integrations.transformers import apply_em_kernels
from em_kernels.lm.heads import ModelError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
VISION = dict(
    depth=1,
    hidden_size=32,
    intermediate_size=32,
    num_heads=2,
    out_hidden_size=32,
    patch_size=4,
    spatial_merge_size=1,
    temporal_patch_size=1,
    deepstack_visual_indexes=[],
    num_position_embeddings=16,
)
TEXT = dict(
    **BASE,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    head_dim=16,
    rope_scaling=dict(rope_type="default", mrope_section=[4, 2, 2]),
    router_aux_loss_coef=0.3,
)


def qwen3_vl_moe():
    config = transformers.Qwen3VLMoeConfig(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=61,
        video_token_id=62,
        vision_start_token_id=60,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def of(kind: str, **changes):
    def build():
        config = getattr(transformers, f"{kind}Config")(**{**BASE, **changes})
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return build


ROUTERS = {
    "model.router_aux_loss_coef": of("Mixtral", num_local_experts=4, router_aux_loss_coef=0.3),
    "model.aux_loss_coef": of(
        "JetMoe", num_local_experts=4, kv_channels=16, num_key_value_heads=1, aux_loss_coef=0.3
    ),
    "config.text_config": qwen3_vl_moe,
    "granite": of("GraniteMoe", num_local_experts=4, router_aux_loss_coef=0.3, logits_scaling=2.0),
}


@pytest.mark.parametrize("where", ROUTERS)
def test_a_routers_loss_is_added_as_the_model_does(where):
    torch.manual_seed(0)
    model = ROUTERS[where]().eval().float()
    inputs = dict(input_ids=IDS, labels=IDS, output_router_logits=True)
    own = model(**inputs)
    apply_em_kernels(model)
    out = model(**inputs, em_outputs=("entropy",))
    assert own.aux_loss > 0 and torch.equal(out.aux_loss, own.aux_loss)
    assert out.loss.item() == pytest.approx(own.loss.item(), rel=1e-5)
    plain = model(input_ids=IDS, labels=IDS, output_router_logits=False, em_outputs=("entropy",))
    assert abs(plain.loss.item() - own.loss.item()) > 0.1
    names = [name for name, _ in model.named_parameters()]
    grads = [
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for loss in (out.loss, own.loss)
    ]
    routers = [
        i for i, name in enumerate(names) if "router" in name or name.endswith("gate.weight")
    ]
    assert routers
    for i in routers:
        assert error(grads[0][i], grads[1][i]) < 1e-3
    assert "_loss_function" not in model.__dict__
    assert model(**inputs).loss.item() == pytest.approx(own.loss.item(), rel=1e-6)


class Adding(transformers.Qwen2ForCausalLM):
    """Adds `extra(outputs)` to its loss."""

    extra = staticmethod(lambda model, outputs: 0.25 + 0.0 * outputs.logits.shape[0])

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + self.extra(self, outputs)
        return outputs


def adding(extra):
    model = Adding(make_model().config).double().eval()
    model.extra = extra
    return model


def test_any_term_that_needs_no_logits_is_added():
    model = adding(lambda model, outputs: model.model.embed_tokens.weight.square().mean())
    own = model(input_ids=IDS, labels=IDS).loss
    out = apply_em_kernels(model)(input_ids=IDS, labels=IDS, em_outputs=("entropy",))
    assert out.loss.item() == pytest.approx(own.item(), rel=1e-5)
    assert model(input_ids=IDS, em_outputs=("entropy",)).loss is None


def test_a_term_of_the_logits_is_refused():
    model = adding(lambda model, outputs: 1e-3 * outputs.logits.logsumexp(-1).square().mean())
    with pytest.raises(ModelError, match=r"something made of its logits.*set that to 0"):
        apply_em_kernels(model)


def test_no_memory_for_a_loss_is_not_a_model_without_one():
    model = of("Mixtral", num_local_experts=4)().eval()
    own = model.forward

    def forward(labels=None, **kwargs):
        if labels is not None:
            raise torch.OutOfMemoryError("no memory")
        return own(**kwargs)

    model.forward = forward
    with pytest.raises(torch.OutOfMemoryError):
        apply_em_kernels(model)


def test_a_loss_function_of_the_users_is_still_there():
    model = make_model(num_hidden_layers=1).double().eval()
    model.loss_function = lambda logits, labels, **kwargs: logits.sum()
    own = model(input_ids=IDS, labels=IDS).loss
    apply_em_kernels(model)(input_ids=IDS, labels=IDS, em_outputs=("entropy",))
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, own)


def test_a_router_of_unknown_weight_is_refused():
    """A model that makes its loss itself: nothing can be asked of its loss function."""
    model = of("Mixtral", num_local_experts=4)().eval().float()
    own = model.forward

    def forward(labels=None, **kwargs):
        outputs = own(**kwargs)
        if labels is not None:
            outputs.loss = nn.functional.cross_entropy(outputs.logits[0], labels[0])
        return outputs

    model.forward = forward
    apply_em_kernels(model)
    with pytest.raises(ValueError, match=r"aux_loss, whose weight .*output_router_logits = False"):
        model(input_ids=IDS, labels=IDS, output_router_logits=True, em_outputs=("entropy",))
    out = model(input_ids=IDS, labels=IDS, em_outputs=("entropy",))
    assert out.loss > 0
