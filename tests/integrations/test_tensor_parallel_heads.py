"""The functions of Megatron-Core, NeMo-RL, slime and SkyRL for logits cut over the vocabulary.

Each is defined here by the textbook, in float64 over the whole vocabulary, under the signature that
the framework has published; two processes have a half of the logits each.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from distributed import run_on_ranks

from em_kernels.integrations import megatron, nemo_rl, skyrl, slime

S, B, VOCAB = 6, 2, 14
HALF = VOCAB // 2
RANGES = ((0, HALF), (HALF, VOCAB))


def draw(batch_first):
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(S, B, VOCAB, dtype=torch.float64, generator=generator)
    target = torch.randint(0, VOCAB, (S, B), generator=generator)
    target[2, 1] = -100
    upstream = torch.randn(2, S, B, dtype=torch.float64, generator=generator)
    if batch_first:
        return logits.transpose(0, 1), target.T, upstream.transpose(1, 2)
    return logits, target, upstream


def keep_mask():
    return torch.arange(S * B * VOCAB).view(S * B, VOCAB) % 3 > 0


def textbook(logits, target):
    """(log p, 0 where there is no target; entropy)."""
    logp = logits.log_softmax(-1)
    known = (target >= 0) & (target < VOCAB)
    picked = logp.gather(-1, target.clamp(0, VOCAB - 1)[..., None])[..., 0]
    return torch.where(known, picked, 0), -(logp.exp() * logp).sum(-1)


# name -> (whether (B, S), the definition of whole logits, the call of this rank's part)


def of_slime(function, mask=None, **options):
    def call(logits, target, group):
        part = None if mask is None else mask()[:, slice(*RANGES[dist.get_rank(group)])]
        flat = logits.reshape(S * B, -1)
        options_ = {**options, "log_prob_keep_mask": part}
        logprob, entropy = function(flat, target.reshape(-1), group, with_entropy=True, **options_)
        assert logprob.shape == (S * B, 1) and entropy.shape == (S * B,)
        return logprob.view(target.shape), entropy.view(target.shape)

    return call


def kept_textbook(logits, target):
    """slime's: log p among the entries kept and the target; the entropy among all."""
    rows = torch.arange(VOCAB) == target[..., None]
    kept = logits.masked_fill(~(keep_mask().view(S, B, VOCAB) | rows), -torch.inf)
    return textbook(kept, target)[0], textbook(logits, target)[1]


def span(group):
    return RANGES[dist.get_rank(group)]


CASES = {
    "megatron": (
        False,
        lambda z, y: (-textbook(z, y)[0],),
        lambda z, y, g: (megatron.vocab_parallel_cross_entropy(z, y, 0.0, g),),
    ),
    "megatron, its own group": (
        False,
        lambda z, y: (-textbook(z, y)[0],),
        lambda z, y, g: (megatron.vocab_parallel_cross_entropy(z, y),),
    ),
    "megatron, fused": (
        False,
        lambda z, y: (-textbook(z, y)[0],),
        lambda z, y, g: (megatron.fused_vocab_parallel_cross_entropy(z, y, g),),
    ),
    "nemo": (
        True,
        lambda z, y: (textbook(z, y)[0],),
        lambda z, y, g: (nemo_rl.DistributedLogprob.apply(z, y, *span(g), g, False),),
    ),
    "nemo, chunks": (
        True,
        lambda z, y: (textbook(z, y)[0], -textbook(z, y)[1]),
        lambda z, y, g: (
            nemo_rl.ChunkedDistributedLogprob.apply(z, y, *span(g), 4, g),
            nemo_rl.ChunkedDistributedEntropy.apply(z, 4, g),
        ),
    ),
    "slime": (False, textbook, of_slime(slime.calculate_log_probs_and_entropy, chunk_size=5)),
    "slime, kept": (
        False,
        kept_textbook,
        of_slime(slime.calculate_log_probs_and_entropy, keep_mask),
    ),
    "skyrl": (
        True,
        lambda z, y: (textbook(z, y)[0], textbook(z, y)[1]),
        lambda z, y, g: (
            skyrl.DistributedLogprob.apply(z, y, *span(g), g),
            skyrl.vocab_parallel_entropy(z, chunk_size=4),
        ),
    ),
    "skyrl, sum": (
        True,
        lambda z, y: (textbook(z, y)[1].mul(torch.arange(S)).sum(),),
        lambda z, y, g: (
            skyrl.vocab_parallel_entropy_weighted_sum(z, torch.arange(S), chunk_size=4),
        ),
    ),
}


def with_megatron(group):
    """`megatron.core.parallel_state`, of which the functions ask for the group alone."""
    names = ("megatron", "megatron.core", "megatron.core.parallel_state")
    modules = [ModuleType(name) for name in names]
    modules[1].parallel_state = modules[2]
    modules[2].get_tensor_model_parallel_group = lambda: group
    sys.modules.update(zip(names, modules))


def run_case(name):
    """In one of two processes: its results, and the gradient of its part."""
    group = dist.group.WORLD
    with_megatron(group)
    if name == "checks":
        return checks(group)
    batch_first, _, call = CASES[name]
    logits, target, upstream = draw(batch_first)
    own = logits[..., slice(*span(group))].float().detach().requires_grad_()
    before = own.detach().clone()
    results = call(own, target, group)
    loss = sum((r * u if r.dim() else r).sum() for r, u in zip(results, upstream.float()))
    (gradient,) = torch.autograd.grad(loss, own)
    assert torch.equal(own.detach(), before) and gradient.shape == own.shape
    return [r.detach() for r in results], gradient


def checks(group):
    """What takes no gradient, what is empty, and errors, on every rank."""
    logits, target, _ = draw(True)
    own = logits[..., slice(*span(group))].float().detach().requires_grad_()
    assert not nemo_rl.DistributedLogprob.apply(
        own, target, *span(group), group, True
    ).requires_grad
    assert not nemo_rl.ChunkedDistributedEntropy.apply(own, 4, group, True).requires_grad
    flat, tokens = own.reshape(-1, HALF), target.reshape(-1)
    for mask in (None, flat > -9):
        options = dict(with_entropy=True, with_entropy_grad=False, log_prob_keep_mask=mask)
        logprob, entropy = slime.calculate_log_probs_and_entropy(flat, tokens, None, **options)
        assert logprob.requires_grad and not entropy.requires_grad
    logprob, entropy = slime.calculate_log_probs_and_entropy(flat, tokens, group)
    assert logprob.shape == (S * B, 1) and entropy is None
    none = slime.calculate_log_probs_and_entropy(flat[:0], tokens[:0], group, with_entropy=True)
    assert [x.shape for x in none] == [(0,), (0,)]
    wrapped = type("Reloadable", (), {"group": group})()
    again, _ = slime.calculate_log_probs_and_entropy(flat, tokens, wrapped)
    assert torch.equal(again, logprob)
    half = own.bfloat16().detach().requires_grad_()
    loss = megatron.vocab_parallel_cross_entropy(half, target, tp_group=group)
    same = megatron.vocab_parallel_cross_entropy(half.detach().float(), target, tp_group=group)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), same, rtol=1e-6, atol=1e-6)
    assert torch.autograd.grad(loss.sum(), half)[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="vocab_start_index and vocab_end_index"):
        nemo_rl.DistributedLogprob.apply(own, target, 0, VOCAB, group)
    with pytest.raises(ValueError, match="target must have the leading shape"):
        megatron.vocab_parallel_cross_entropy(own, target[:, :2], tp_group=group)
    with pytest.raises(ValueError, match="log_prob_keep_mask must have shape"):
        slime.calculate_log_probs_and_entropy(flat, tokens, group, log_prob_keep_mask=tokens > 0)
    with pytest.raises(TypeError, match=r"tp_group must be .*, got str"):
        megatron.fused_vocab_parallel_cross_entropy(own, target, "tp")
    return "passed"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """name -> what each of two processes returned."""
    return run_on_ranks(2, run_case, [*CASES, "checks"], tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_the_definition_over_the_whole_vocabulary(ranks, name):
    batch_first, definition, _ = CASES[name]
    logits, target, upstream = draw(batch_first)
    logits = logits.detach().requires_grad_()
    want = definition(logits, target)
    loss = sum((r * u if r.dim() else r).sum() for r, u in zip(want, upstream))
    (gradient,) = torch.autograd.grad(loss, logits)
    for result in ranks[name]:
        assert not isinstance(result, str), result
        for got, expected in zip(result[0], want, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    joined = torch.cat([result[1] for result in ranks[name]], -1).double()
    torch.testing.assert_close(joined, gradient, rtol=1e-5, atol=1e-5)


def test_gradients_emptiness_and_errors(ranks):
    assert ranks["checks"] == ["passed"] * 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_skyrls_functions_of_whole_logits(dtype):
    logits, target, upstream = draw(True)
    logits = logits.to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    want = textbook(wide, target)
    mask = torch.arange(S * B).view(B, S) % 4 > 0
    got = (
        skyrl.logprobs_from_logits(logits, target),
        skyrl.chunked_entropy_from_logits(logits, True, mask.float(), 4),
    )
    want = (want[0], want[1] * mask)
    for g, w in zip(got, want):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(sum((r * u).sum() for r, u in zip(results, upstream)), x)[0]
        for results, x in ((got, logits), (want, wide))
    ]
    digits = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(grads[0].double(), grads[1], **digits)
    assert not skyrl.chunked_entropy_from_logits(logits).requires_grad
    compiled = torch.compile(skyrl.chunked_entropy_from_logits, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, True, mask), got[1], rtol=0, atol=0)


def test_without_a_group_the_vocabulary_is_whole(monkeypatch):
    logits, target, _ = draw(False)
    logprob, entropy = slime.calculate_log_probs_and_entropy(
        logits.flatten(0, 1), target.flatten(), None, with_entropy=True
    )
    want = textbook(logits, target)
    torch.testing.assert_close(logprob[:, 0], want[0].flatten())
    torch.testing.assert_close(entropy, want[1].flatten())
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ImportError, match="tp_group is Megatron-Core's"):
        megatron.vocab_parallel_cross_entropy(logits, target)
    with pytest.raises(ImportError, match="tp_group is Megatron-Core's"):
        skyrl.vocab_parallel_entropy(logits)


@pytest.mark.parametrize("smoothing", (0.1, 1, "0"))
def test_label_smoothing_is_refused(smoothing):
    logits, target, _ = draw(False)
    with pytest.raises(ValueError, match="label_smoothing must be 0, got"):
        megatron.vocab_parallel_cross_entropy(logits, target, smoothing)


def test_the_signatures_are_the_published_ones():
    names = {
        megatron.vocab_parallel_cross_entropy: (
            "vocab_parallel_logits target label_smoothing tp_group"
        ),
        megatron.fused_vocab_parallel_cross_entropy: "vocab_parallel_logits target tp_group",
        slime.calculate_log_probs_and_entropy: (
            "logits tokens tp_group with_entropy chunk_size log_prob_keep_mask with_entropy_grad"
        ),
        skyrl.logprobs_from_logits: "logits labels inplace_backward",
        skyrl.chunked_entropy_from_logits: "logits requires_grad attention_mask chunk_size",
        skyrl.vocab_parallel_entropy: "vocab_parallel_logits chunk_size chunk_memory_mb",
        skyrl.vocab_parallel_entropy_weighted_sum: (
            "vocab_parallel_logits weights chunk_size chunk_memory_mb"
        ),
    }
    for function, listed in names.items():
        assert list(inspect.signature(function).parameters) == listed.split()


def test_verls_entropy_has_the_first_argument_of_skyrls():
    spec = importlib.util.find_spec("verl")
    if spec is None:
        pytest.skip("verl is not installed")
    source = Path(spec.submodule_search_locations[0]) / "utils/megatron/tensor_parallel.py"
    functions = {f.name: f for f in ast.parse(source.read_text()).body if hasattr(f, "args")}
    arguments = [a.arg for a in functions["vocab_parallel_entropy"].args.args]
    assert arguments == list(inspect.signature(skyrl.vocab_parallel_entropy).parameters)[:1]
