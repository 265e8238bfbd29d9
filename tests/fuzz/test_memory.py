"""Memory after many calls is what it was before: heap and Python's objects, after errors too."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import FAST_IMPLS, IMPLS

import em_kernels as em
from fuzz.budget import FACTOR

CALLS = 100 if FACTOR == 1 else 10_000
STATM = Path("/proc/self/statm")
try:
    _libc = ctypes.CDLL("libc.so.6")
    _mallinfo = _libc.mallinfo2
except (OSError, AttributeError):
    pytest.skip("glibc 2.33 counts what is in use", allow_module_level=True)


class _Info(ctypes.Structure):
    """mallinfo2(3)."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


_mallinfo.restype = _Info


def in_use() -> tuple[int, int, int]:
    """(bytes of the heap, resident bytes, Python's objects)."""
    gc.collect()
    info = _mallinfo()
    resident = int(STATM.read_text().split()[1]) * 4096
    return info.uordblks + info.hblkhd, resident, len(gc.get_objects())


def grown(call: Callable[[], None], calls: int) -> tuple[float, float, float]:
    """What a call leaves behind: bytes of the heap, resident bytes, objects."""
    for _ in range(max(20, calls // 10)):
        call()
    before = in_use()
    for _ in range(calls):
        call()
    return tuple((b - a) / calls for a, b in zip(before, in_use(), strict=True))


ROWS, VOCAB, DIM = 4, 512, 16


def operands(dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    x = torch.randn(ROWS, VOCAB, dtype=dtype, device=device, requires_grad=True)
    h = torch.randn(ROWS, DIM, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(VOCAB, DIM, dtype=dtype, device=device, requires_grad=True)
    return x, h, w, torch.arange(ROWS, device=device), torch.ones(ROWS, device=device)


def calls_of(impl: str, device: str) -> dict[str, Callable[[], None]]:
    x, h, w, y, ones = operands(torch.float32, device)
    half, half_w = (z.detach().bfloat16().requires_grad_() for z in (h, w))
    options = dict(impl=impl)

    def backward(total: torch.Tensor, *inputs: torch.Tensor) -> None:
        torch.autograd.grad(total, inputs)

    return {
        "softmax_stats": lambda: backward(em.softmax_stats(x, y, **options).entropy.sum(), x),
        "token_loss": lambda: backward(
            em.token_loss(x, y, entropy_weight=ones, logprob_weight=ones, **options).loss, x
        ),
        "linear_softmax_stats": lambda: backward(
            em.linear_softmax_stats(h, w, y, chunk_tokens=2, **options).logprob.sum(), h, w
        ),
        "linear_entropy_loss": lambda: backward(em.linear_entropy_loss(h, w, **options), h, w),
        "16-bit head": lambda: backward(
            em.linear_entropy_loss(half, half_w, logits_dtype=torch.float32, **options),
            half,
            half_w,
        ),
        "divergence": lambda: backward(em.divergence(x, 2 * x, kind="js", **options).sum(), x),
        "linear_divergence_loss": lambda: backward(
            em.linear_divergence_loss(h, w, h, w.detach(), token_weight=ones, **options).loss, h, w
        ),
        "top_logprobs": lambda: em.top_logprobs(x, 3, **options) and None,
        "truncated": lambda: backward(
            em.softmax_stats(x, top_k=9, top_p=0.9, outputs=("entropy",), **options).entropy.sum(),
            x,
        ),
        "second derivative": lambda: backward(_gradient(x, **options).square().sum(), x),
        "error before": lambda: _refused(lambda: em.softmax_stats(x, y.int(), **options)),
        "error inside": lambda: _refused(lambda: em.softmax_stats(x, y + VOCAB, **options)),
        "error of a head": lambda: _refused(
            lambda: em.linear_token_loss(h, w, y - 9, logprob_weight=ones, **options)
        ),
    }


def _gradient(x: torch.Tensor, **options) -> torch.Tensor:
    entropy = em.softmax_stats(x, outputs=("entropy",), **options).entropy
    return torch.autograd.grad(entropy.sum(), x, create_graph=True)[0]


def _refused(call: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError)):
        call()


def check(call: Callable[[], None], calls: int = CALLS) -> None:
    """A tensor is 2 kB and more, an object of Python's own at least one."""
    heap, resident, objects = grown(call, calls)
    assert heap < 64 and objects < 0.2, f"a call leaves {heap:.0f} bytes and {objects:.2f} objects"
    if calls >= 10_000:  # fewer are lost in what the allocator takes at once
        assert resident < 512, f"resident memory grows by {resident:.0f} bytes a call"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of a GPU lie in torch's own memory")
@pytest.mark.parametrize("name", list(calls_of("reference", "cpu")))
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_a_call_leaves_nothing_behind(impl, name):
    check(calls_of(impl, "cpu")[name])


@pytest.mark.skipif(FACTOR == 1, reason="minutes: make fuzz")
@pytest.mark.parametrize("impl", [name for name in IMPLS if name not in FAST_IMPLS])
def test_interpreted_kernels_leave_nothing_behind(impl):
    check(calls_of(impl, "cpu")["token_loss"], 300)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of a GPU lie in torch's own memory")
@pytest.mark.parametrize("impl", FAST_IMPLS)
def test_compiled_calls_leave_nothing_behind(impl):
    x, _, _, _, ones = operands(torch.float32, "cpu")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x):
        return em.token_loss(x, entropy_weight=ones, impl=impl).loss * 2

    check(lambda: torch.autograd.grad(compiled(x), x) and None)


def test_a_leak_is_seen():
    """Of a tensor, and of one that an error keeps."""
    kept: list[object] = []
    with pytest.raises(AssertionError, match="a call leaves"):
        check(lambda: kept.append(torch.ones(100)), 100)

    def raising() -> None:
        try:
            em.softmax_stats(torch.zeros(3, 5), torch.zeros(3))
        except ValueError as error:
            kept.append(error)
        except TypeError as error:
            kept.append(error)

    with pytest.raises(AssertionError, match="a call leaves"):
        check(raising, 100)
