"""What stands between a head and the logits, and what the head is given."""

from __future__ import annotations

import pytest
import torch
import transformers
from head_changes import IDS, check_right, run_patched
from helpers import error, truth
from tiny_qwen2 import make_model
from torch import nn

from em_kernels.integrations.transformers import apply_em_kernels, entropy_loss_func
from em_kernels.lm.head_call import head_input
from em_kernels.lm.heads import ModelError, read_head
from em_kernels.lm.models import check_causal, hidden_states


class Transformed(transformers.Qwen2ForCausalLM):
    """A Qwen2 that makes its logits with `after(products, config)`."""

    after = staticmethod(lambda products, config: products)

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = self.after(outputs.logits, self.config)
        return outputs


def transformed(after, dtype=torch.float64, **config):
    plain = make_model(tie_word_embeddings=False)
    model = Transformed(plain.config).to(dtype).eval()
    model.load_state_dict(plain.state_dict())
    model.after = after
    for name, value in config.items():
        setattr(model.config, name, value)
    return model


def capped(name):
    return lambda z, config: getattr(config, name) * torch.tanh(z / getattr(config, name))


KNOWN = {
    "final_logit_softcapping": (capped("final_logit_softcapping"), 5.0),
    "logits_soft_cap": (capped("logits_soft_cap"), 4.0),
    "output_logit_soft_cap": (capped("output_logit_soft_cap"), 3.0),
    "logit_scale": (lambda z, config: z * config.logit_scale, 0.25),
    "lm_head_multiplier": (lambda z, config: z * config.lm_head_multiplier, 0.3),
    "output_multiplier": (lambda z, config: z * config.output_multiplier, 0.2),
    "logits_scaling": (lambda z, config: z / config.logits_scaling, 8.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_names_of_softcap_and_scale(name):
    after, value = KNOWN[name]
    check_right(apply_em_kernels(transformed(after, **{name: value})))
    with pytest.raises(ModelError, match=r"from its config; .*: em_kernels\.softmax_stats"):
        apply_em_kernels(transformed(lambda z, config: 1.05 * after(z, config), **{name: value}))


UNKNOWN = {
    "softcap": lambda z, config: 50 * torch.tanh(z / 50),
    "wide softcap": lambda z, config: 500 * torch.tanh(z / 500),
    "scale": lambda z, config: 1.03 * z,
    "bias": lambda z, config: z + torch.linspace(-1, 1, z.shape[-1]).to(z),
    "fewer tokens": lambda z, config: z[..., :-3],
    "a token forbidden": lambda z, config: z.index_fill(-1, torch.tensor([7]), -1e4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UNKNOWN)
def test_one_probe_refuses_anything_else(name, dtype):
    model = transformed(UNKNOWN[name], dtype)
    with pytest.raises(ModelError, match=r"such a head is not supported"):
        apply_em_kernels(model)
    with pytest.raises(ModelError, match=r"such a head is not supported"):
        check_causal(model, read_head(model), [5, 6, 7])


def test_recurrent_gemma_has_its_softcap():
    config = transformers.RecurrentGemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=16,
        block_types=("recurrent", "attention"),
        logits_soft_cap=2.0,
    )
    model = transformers.RecurrentGemmaForCausalLM(config).eval()
    nn.init.normal_(model.lm_head.weight)
    check_causal(model, read_head(model), [5, 6, 7])
    with torch.no_grad():
        expected = truth(model(input_ids=IDS, use_cache=False).logits)["entropy"]
        out = apply_em_kernels(model)(input_ids=IDS, em_outputs=("entropy",))
    assert read_head(model).softcap == 2 and error(out.entropy, expected) < 1e-5


def test_hyperclovax_multiplies_by_what_granite_divides_by():
    small = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    config = transformers.HyperCLOVAXConfig(vocab_size=32, logits_scaling=0.25, **small)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    check_right(apply_em_kernels(model))


def test_minicpm3_divides_its_hidden_states_and_not_its_logits():
    config = transformers.MiniCPM3Config(
        vocab_size=32,
        hidden_size=32,
        dim_model_base=8,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    nn.init.normal_(model.lm_head.weight)
    check_right(apply_em_kernels(model))


def test_hidden_states_are_what_the_head_is_given():
    """Not what the backbone gives: a model may scale it in between."""
    model = make_model().double().eval()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] / 24,))
    inputs = dict(input_ids=IDS, use_cache=False)
    assert torch.equal(head_input(model, **inputs), model.model(**inputs).last_hidden_state / 24)
    head = read_head(model)
    check_causal(model, head, [5, 6, 7])
    with torch.no_grad():
        hidden = hidden_states(model, IDS, torch.ones_like(IDS))
        assert error(hidden @ head.weight.T, model(**inputs).logits) < 1e-12


def test_a_model_that_calls_its_head_twice_or_never_is_refused():
    model = make_model().eval()
    once = model.forward
    model.forward = lambda **inputs: (once(**inputs), once(**inputs))[0]
    with pytest.raises(ModelError, match="calls its head more than once"):
        head_input(model, input_ids=IDS)
    model.forward = lambda **inputs: model.model(**inputs)
    with pytest.raises(ModelError, match=r"did not call its head: .*undo that"):
        head_input(model, input_ids=IDS)


def test_a_call_that_fails_after_the_head_leaves_nothing_behind():
    model = apply_em_kernels(make_model().double().eval())
    handle = model.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        head_input(model, input_ids=IDS)
    handle.remove()
    check_right(model)
    own = type(model).forward

    def fails(self, *args, **kwargs):
        own(self, *args, **kwargs)
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(type(model), "forward", fails)
        run_patched(model)
    check_right(model)


def test_hidden_states_of_a_compiled_model_are_compiled_once():
    model, graphs = make_model().eval(), []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph)
    counts = []
    for _ in range(3):
        hidden = head_input(compiled, input_ids=IDS, use_cache=False)
        counts.append(len(graphs))
    assert error(hidden, head_input(model, input_ids=IDS, use_cache=False)) < 1e-6
    assert 0 < counts[0] == counts[1] == counts[2]


def test_hidden_states_of_a_model_that_has_a_loss_function():
    model = make_model().train()
    expected = head_input(model, input_ids=IDS)
    entropy_loss_func(model)
    assert torch.equal(head_input(model, input_ids=IDS), expected)


def test_a_model_that_counts_positions_otherwise_is_refused():
    """RoBERTa's first position is 2: with those of `hidden_states` it is another model."""
    shape = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=48)
    config = transformers.RobertaConfig(vocab_size=32, is_decoder=True, **shape)
    model = transformers.RobertaForCausalLM(config).eval()
    with pytest.raises(ModelError, match="does not count positions from 0"):
        check_causal(model, read_head(model), [5, 6, 7])
