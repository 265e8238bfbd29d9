"""MLPs over pieces of the sequence: the numbers of the whole, and nothing computed a third time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_qwen2 import make_model
from torch import nn

from em_kernels.lm import pieces
from em_kernels.lm.models import enable_gradient_checkpointing
from em_kernels.lm.pieces import decoder_layers, split_mlps, whole_again

IDS = torch.arange(46).view(2, 23) % 20 + 4
SMALL = dict(vocab_size=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
CONFIGS = {
    "qwen2": lambda: make_model().config,
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=24,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),  # its layers are no Linear
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=24, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.0
    ),  # its MLP is given the residual too
    "phi": lambda: transformers.PhiConfig(intermediate_size=24, **SMALL),
    "mixtral": lambda: transformers.MixtralConfig(
        intermediate_size=24, num_key_value_heads=1, num_local_experts=4, **SMALL
    ),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 8)  # of two rows four tokens each: 23 are six pieces


def made(config):
    torch.manual_seed(0)
    eager = dict(experts_implementation="eager")  # of experts the others know no float64
    model = transformers.AutoModelForCausalLM.from_config(config, **eager)
    return model.double().train()


def gradients(model, ids=IDS) -> dict[str, torch.Tensor]:
    """Of a loss whose gradient differs from token to token."""
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.double().sin() * torch.arange(logits.shape[1])[:, None]).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worst(actual: dict, expected: dict) -> float:
    assert actual.keys() == expected.keys()
    return max(float((actual[n] - g).norm() / g.norm()) for n, g in expected.items() if g.norm())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_those_of_the_whole(name, checkpointing):
    model = made(CONFIGS[name]())
    expected = gradients(copy.deepcopy(model))
    assert split_mlps(model) == []
    if checkpointing:
        enable_gradient_checkpointing(model)
    assert worst(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_token_goes_through_an_mlp_more_than_twice(checkpointing, monkeypatch):
    model, sizes = make_model().train(), []
    split_mlps(model)
    if checkpointing:
        enable_gradient_checkpointing(model)
    kind = type(model.model.layers[0].mlp)
    whole = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: (sizes.append(x.shape), whole(self, x))[1])
    gradients(model)
    assert {shape[:2].numel() for shape in sizes} <= {8, 6}
    assert sum(shape[:2].numel() for shape in sizes) == 2 * 2 * IDS.numel()


def test_only_what_an_mlp_is_given_is_kept(monkeypatch):
    """Bytes that are held for the backward pass grow by nothing between the products."""

    def held(model) -> int:
        kept: dict[int, int] = {}

        def pack(x):
            kept[x.data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(input_ids=IDS, use_cache=False)
        return sum(kept.values())

    plain = make_model(intermediate_size=480)
    before = held(plain)
    split_mlps(plain)
    assert before - held(plain) > 2 * 3 * IDS.numel() * 480 * 4


def test_an_mlp_that_drops_has_the_same_random_numbers_in_both_passes():
    """The gradient is that of the function that was computed, by differences."""
    config = CONFIGS["gpt2"]()
    config.resid_pdrop = 0.5
    model = made(config)
    mlp = model.transformer.h[0].mlp
    split_mlps(model)
    x = torch.randn(1, 23, 16, dtype=torch.float64, requires_grad=True)

    def f(x):
        torch.manual_seed(3)
        return (mlp(x) * torch.arange(16)).sum()

    found = torch.autograd.grad(f(x), x)[0]
    d = torch.randn_like(x)
    with torch.no_grad():
        slope = (f(x + 1e-6 * d) - f(x - 1e-6 * d)) / 2e-6
    assert float((found * d).sum()) == pytest.approx(float(slope), rel=1e-6)
    loss = f(x)
    after = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_pieces_are_as_near_to_the_truth_as_the_whole(autocast):
    truth = gradients(make_model().double())
    errors = []
    for split in (False, True):
        model = make_model() if autocast else make_model().bfloat16()
        if split:
            split_mlps(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(model)
        mlps = [name for name in truth if ".mlp." in name]
        errors.append([float((found[n] - truth[n]).norm() / truth[n].norm()) for n in mlps])
    assert all(pieced <= 1.1 * whole + 1e-3 for whole, pieced in zip(*errors))


def test_a_lora_on_an_mlp_is_trained_in_pieces():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model().double(), config).double()
    expected = gradients(copy.deepcopy(model))
    assert split_mlps(model) == []
    assert worst(gradients(model), expected) < 1e-12


class Mixing(nn.Module):
    """Two matrices, and tokens that see each other."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 8), nn.Linear(8, 32)

    def forward(self, x):
        return self.down(self.up(x).cumsum(1))


def test_what_mixes_tokens_or_is_no_module_stays_whole():
    model = make_model()
    model.model.layers[1].mlp = Mixing()
    assert split_mlps(model) == [model.model.layers[1]]
    opt = transformers.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16)
    model = made(opt)
    assert split_mlps(model) == decoder_layers(model)


def test_a_model_that_is_split_is_as_before_afterwards():
    model = make_model()
    with pytest.raises(KeyError), whole_again(model):
        split_mlps(model)
        assert all("forward" in layer.mlp.__dict__ for layer in decoder_layers(model))
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_copy_is_split_by_itself():
    model = make_model().double()
    split_mlps(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.layers[0].mlp.up_proj.weight.zero_()
    x = torch.ones(1, 23, 32, dtype=torch.float64)
    assert not copied.model.layers[0].mlp(x).any()
    assert model.model.layers[0].mlp(x).any()
