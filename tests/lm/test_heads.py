"""What a head is at the time of the call: the statistics of the model's own logits, or a refusal.

Every change of a head is made before the model is patched, and again after.
"""

from __future__ import annotations

import pytest
import torch
from head_changes import WHEN, changed, check_right, on_head, run_patched
from tiny_qwen2 import WORDS, make_model
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import prune
from trainer_runs import run, settings

from em_kernels.lm.heads import Head, ModelError, read_head
from em_kernels.ops.divergence import linear_divergence


def linear_of(kind: type, **options):
    """A change that puts a `kind` of nn.Linear with the head's weight in its place."""

    def change(model):
        layer = kind(model.lm_head.in_features, model.lm_head.out_features, bias=False)
        layer.weight = model.lm_head.weight
        model.lm_head = layer

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


class HalvedProduct(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return 0.5 * result if function is linear else result


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
    "a product of its own": (
        on_head(
            lambda h: setattr(h, "weight", nn.Parameter(h.weight.data.as_subclass(HalvedProduct)))
        ),
        r"is a test_heads\.HalvedProduct of torch",
    ),
    "in parts": (
        on_head(lambda h: setattr(h.weight, "data", torch.empty(0))),
        r"has the shape \(0,\), not \(V, D\): FSDP1 and DeepSpeed ZeRO-3",
    ),
    "ZeRO-3": (
        on_head(
            lambda h: (setattr(h.weight, "data", torch.empty(0)), setattr(h.weight, "ds_id", 0))
        ),
        r"is cut by DeepSpeed ZeRO-3 .*deepspeed\.zero\.GatheredParameters",
    ),
    "FSDP1": (
        on_head(
            lambda h: (
                setattr(h.weight, "data", torch.empty(40)),
                setattr(h.weight, "_fsdp_flattened", True),
            )
        ),
        r"is cut by FSDP1 .*summon_full_params",
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


# Other people's layers


@WHEN
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_weights_are_refused(kind, when):
    quantization = pytest.importorskip("torchao.quantization")

    def change(model):
        config = getattr(quantization, kind)()
        quantization.quantize_(model, config, filter_fn=lambda layer, name: name == "lm_head")

    with pytest.raises(ModelError, match=r"torchao\..*Tensor of .*out of quantisation"):
        run_patched(changed(change, when, dtype=torch.float32))


def test_quantised_layers_of_the_backbone_are_no_matter():
    quantization = pytest.importorskip("torchao.quantization")

    def in_backbone(layer, name):
        return isinstance(layer, nn.Linear) and "layers" in name

    def change(model):
        config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(model, config, filter_fn=in_backbone)

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


@pytest.mark.parametrize("rows, other_rows", [(9, 9), (9, 7), (7, 9)])
def test_two_heads_are_compared_each_with_its_own_transform(rows, other_rows):
    """Over the entries that both have; nothing is sent to the other."""
    drawn = ((2, 5, 4), (rows, 4), (rows,), (2, 5, 3), (other_rows, 3), (other_rows,))
    tensors = [torch.randn(*shape).requires_grad_() for shape in drawn]
    hidden, weight, bias, other_hidden, other_weight, other_bias = tensors
    head, other = Head(weight, bias, None, 0.5), Head(other_weight, other_bias, 2.0, 1.5)
    shared = min(rows, other_rows)
    p, q = (
        h.logits(x)[..., :shared].double().log_softmax(-1)
        for h, x in ((head, hidden), (other, other_hidden))
    )
    expected = (p.exp() * (p - q)).sum(-1)
    pair = dict(hidden=hidden, other_hidden=other_hidden.detach(), **head.beside(other))
    found = linear_divergence(**pair, kind="reverse_kl")
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(expected.sum(), tensors[:3])
    gradients = torch.autograd.grad(found.sum(), tensors, allow_unused=True)
    assert gradients[3:] == (None, None, None)
    for one, two in zip(gradients, wanted):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
