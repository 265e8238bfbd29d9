"""What a head is at the time of the call: the statistics of the model's own logits, or a refusal.

Every change of a head is made before the model is patched, and again after.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import error, truth
from tiny_qwen2 import WORDS, make_model
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import prune
from trainer_runs import run, settings

from em_kernels._head_call import check_head, head_input
from em_kernels.heads import ModelError, read_head
from em_kernels.integrations.transformers import apply_em_kernels, entropy_loss_func
from em_kernels.linear_softmax_stats import linear_softmax_stats
from em_kernels.trainer.models import check_causal, hidden_states

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


def linear_of(kind: type, **options):
    """A change that puts a `kind` of nn.Linear with the head's weight in its place."""

    def change(model):
        layer = kind(model.lm_head.in_features, model.lm_head.out_features, bias=False)
        layer.weight = model.lm_head.weight
        model.lm_head = layer

    return change


def on_head(act):
    """A change that calls act(head)."""

    def change(model):
        act(model.lm_head)

    return change


class Named(nn.Linear):
    pass


class Halved(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


class CalledHalved(nn.Linear):
    def __call__(self, x):
        return 0.5 * super().__call__(x)


class Packed(nn.Module):
    """As GPTQ and AWQ keep a layer: no weight, only what it is made of."""

    def __init__(self, weight):
        super().__init__()
        self.qweight = nn.Buffer((weight * 8).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.qweight.to(x) / 8).T


def replace_weight(head):
    head.weight = nn.Parameter(torch.randn_like(head.weight))


def with_bias(model):
    model.set_output_embeddings(nn.Linear(32, len(WORDS)).double())


RIGHT = {
    "a subclass without a forward": linear_of(Named),
    "weight replaced": on_head(replace_weight),
    "bias": with_bias,
    "vocabulary resized": lambda model: model.resize_token_embeddings(len(WORDS) + 7) and None,
    "weight_norm": on_head(nn.utils.parametrizations.weight_norm),
    "weight_norm, of old": on_head(nn.utils.weight_norm),
    "spectral_norm": on_head(nn.utils.parametrizations.spectral_norm),
    "pruned": on_head(lambda head: prune.l1_unstructured(head, "weight", 0.5)),
    "pre-hook": on_head(lambda h: h.register_forward_pre_hook(lambda m, args: (0.5 * args[0],))),
    "hook that reads": on_head(lambda h: h.register_forward_hook(lambda m, args, out: None)),
}


@WHEN
@pytest.mark.parametrize("name", RIGHT)
def test_heads_that_are_served(name, when):
    check_right(changed(RIGHT[name], when))


@pytest.mark.parametrize("name", ["weight_norm, of old", "pruned"])
def test_a_weight_made_in_a_pre_hook_is_made_anew(name):
    model = changed(RIGHT[name], "before")
    read_head(model)
    with torch.no_grad():
        for parameter in model.lm_head.parameters():
            parameter.add_(0.1)
    check_right(model)


@WHEN
def test_a_head_in_float32_over_a_model_in_bfloat16(when):
    """Right with a cast in a pre-hook; without one the model itself cannot."""

    def cast(model):
        model.lm_head.float().weight.data.mul_(10)
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))

    check_right(changed(cast, when, dtype=torch.bfloat16), 1e-5)
    with pytest.raises(ModelError, match=r"torch.bfloat16 by a weight of torch.float32.*pre-hook"):
        run_patched(changed(on_head(nn.Module.float), when, dtype=torch.bfloat16))


def run_patched(model):
    model(input_ids=IDS, labels=IDS, em_outputs=("entropy",))


def halve_in_place(module, args, output):
    output.mul_(0.5)


def forbid_a_token(module, args, output):
    output[..., 5] = -1e4


def put_forward(forward):
    def act(head):
        head.forward = lambda x: forward(x, head.weight)

    return on_head(act)


HOOK = r"forward hook on the head \(.*\) changes its result; .*: remove the hook"
REPLACED = r"forward of the head of Qwen2ForCausalLM was replaced by test_heads\..*pre-hook"
REFUSED = {
    "forward halved": (put_forward(lambda x, w: 0.5 * linear(x, w)), REPLACED),
    "forward in float32": (put_forward(lambda x, w: linear(x.float(), w.float())), REPLACED),
    "subclass": (linear_of(Halved), r"is a test_heads\.Halved, not a plain nn\.Linear: .*put an"),
    "call": (linear_of(CalledHalved), r"is a test_heads\.CalledHalved, not a plain nn\.Linear"),
    "class changed": (on_head(lambda head: setattr(head, "__class__", Halved)), "Halved, not a"),
    "packed": (
        lambda model: setattr(model, "lm_head", Packed(model.lm_head.weight.data)),
        r"is a test_heads\.Packed, not a plain .*modules_to_not_convert",
    ),
    "float8": (
        on_head(lambda h: setattr(h.weight, "data", h.weight.data.to(torch.float8_e4m3fn))),
        r"Parameter of torch.float8_e4m3fn: leave the head out of quantisation",
    ),
    "sparse": (
        on_head(lambda h: setattr(h, "weight", nn.Parameter(h.weight.data.to_sparse()))),
        "leave the head out of quantisation",
    ),
    "in parts": (
        on_head(lambda h: setattr(h.weight, "data", torch.empty(0))),
        r"has the shape \(0,\), not \(V, D\): FSDP1 and DeepSpeed ZeRO-3",
    ),
    "hook": (on_head(lambda h: h.register_forward_hook(lambda m, a, out: 0.5 * out)), HOOK),
    "hook in place": (on_head(lambda h: h.register_forward_hook(halve_in_place)), HOOK),
    "hook on a token": (on_head(lambda h: h.register_forward_hook(forbid_a_token)), HOOK),
    "backward hook": (
        on_head(lambda h: h.register_full_backward_hook(lambda *args: None)),
        "has backward hooks, which would not be called",
    ),
    "compiled": (
        lambda model: setattr(model, "lm_head", torch.compile(model.lm_head, backend="eager")),
        "is compiled by itself: compile the model instead",
    ),
    "none": (lambda model: model._modules.pop("lm_head") and None, "has no language-model head"),
}


@WHEN
@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_are_refused_with_what_to_do(name, when):
    change, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        run_patched(changed(change, when))


@pytest.mark.parametrize("name", ["forward halved", "subclass", "hook", "hook in place", "packed"])
def test_training_refuses_them_too(name):
    model = make_model(tie_word_embeddings=False)
    REFUSED[name][0](model)
    with pytest.raises(ModelError, match=REFUSED[name][1]):
        run(settings(), model)


def test_a_hook_that_changes_the_result_is_seen_without_a_version_counter():
    model = changed(on_head(lambda h: h.register_forward_hook(halve_in_place)), "after")
    with torch.inference_mode(), pytest.raises(ModelError, match=HOOK):
        run_patched(model)


# Adapters


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
    if name in ("modules_to_save", "trainable tokens", "another is active"):
        with model.disable_adapter():
            check_right(model)
        check_right(model)


@WHEN
@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "VeraConfig"])
def test_adapters_on_the_head_are_refused(kind, when):
    """At once, though most start as no change at all."""
    peft = pytest.importorskip("peft")
    options = dict(feedforward_modules=[]) if kind == "IA3Config" else {}
    config = getattr(peft, kind)(target_modules=["lm_head"], **options)
    message = r"is a peft\.tuners\..*Linear, not a plain .*out of target_modules .*or merge"
    with pytest.raises(ModelError, match=message):
        run_patched(changed(lambda model: peft.get_peft_model(model, config).double(), when))


@pytest.mark.parametrize("name", ["modules_to_save", "trainable tokens"])
def test_what_is_trained_of_the_head_gets_its_gradient(name):
    model = changed(ADAPTED[name], "after")
    inputs = dict(input_ids=IDS, labels=IDS)
    expected = truth(model(input_ids=IDS).logits[:, :-1])["entropy"].sum()
    model(**inputs, em_outputs=("entropy",)).entropy.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    for p, gradient in zip(trained, torch.autograd.grad(expected, trained)):
        assert error(p.grad, gradient) < 1e-8


def test_tied_trainable_tokens_are_in_the_head():
    peft = pytest.importorskip("peft")
    model = apply_em_kernels(make_model(tie_word_embeddings=True).double().eval())
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6])
    model = peft.get_peft_model(model, config).double().eval()
    for name, parameter in model.named_parameters():
        if "trainable_tokens" in name:
            nn.init.normal_(parameter)
    check_right(model)


# Other people's layers


def test_torchao_weights_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    for when in ("before", "after"):
        for config in (
            quantization.Int8WeightOnlyConfig(),
            quantization.Int8DynamicActivationInt8WeightConfig(),
        ):
            with pytest.raises(ModelError, match=r"torchao\..*Tensor of .*out of quantisation"):
                run_patched(
                    changed(
                        lambda m, c=config: quantization.quantize_(
                            m, c, filter_fn=lambda layer, name: name == "lm_head"
                        ),
                        when,
                        dtype=torch.float32,
                    )
                )


def test_quantised_layers_of_the_backbone_are_no_matter():
    quantization = pytest.importorskip("torchao.quantization")

    def change(model):
        backbone = lambda layer, name: isinstance(layer, nn.Linear) and "layers" in name  # noqa: E731
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=backbone)

    check_right(changed(change, "after", dtype=torch.float32), 1e-5)


@WHEN
def test_heads_that_accelerate_moves(when, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    check_right(
        changed(lambda m: accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True), when)
    )
    offloaded = r"head of Qwen2ForCausalLM is offloaded: keep it .*device_map"
    with pytest.raises(ModelError, match=offloaded):
        run_patched(changed(lambda m: accelerate.cpu_offload(m, "cpu"), when))
    with pytest.raises(ModelError, match=offloaded):
        run_patched(changed(lambda m: accelerate.disk_offload(m, tmp_path, "cpu"), when))

    class Halving(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return 0.5 * output

    add = accelerate.hooks.add_hook_to_module
    with pytest.raises(ModelError, match=r"Halving, which may change its result: .*remove_hook"):
        run_patched(changed(on_head(lambda head: add(head, Halving()) and None), when))
    moving = accelerate.hooks.AlignDevicesHook("cpu")

    def halved_inside(model):
        put_forward(lambda x, w: 0.5 * linear(x, w))(model)
        add(model.lm_head, moving)

    with pytest.raises(ModelError, match=REPLACED):
        run_patched(changed(halved_inside, when))


def test_a_model_without_weights_says_so():
    with torch.device("meta"):
        model = make_model(tie_word_embeddings=False)
    with pytest.raises(ModelError, match="is on the meta device, offloaded or never loaded"):
        read_head(model)


# What stands between the head and the logits


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
