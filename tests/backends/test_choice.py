"""Which backend "auto" takes, and that it is looked up once."""

from types import SimpleNamespace

import pytest
import torch
from helpers import random_logits, random_target

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    softmax_stats,
    token_loss,
)
from em_kernels.backends import choice
from em_kernels.backends.interface import Backend, Descent, Goal, RowSpec
from em_kernels.backends.reference import Reference
from em_kernels.ops import serve

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
EVERYTHING = ("reference", "cpu", "triton", "cuda")
ROWS, LOSS, ALIGNED_LOSS = ("rows", False), ("loss", False), ("loss", True)


@pytest.fixture
def can_serve(monkeypatch):
    """As if those backends, and a GPU of that capability, were there."""

    def pretend(names, capability=(9, 0), cuda="13.0"):
        forget()
        monkeypatch.setattr(
            choice, "why_not", lambda name, device=None: None if name in names else "it is gone"
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(choice, "_loaded", lambda name: SimpleNamespace(name=name))

    yield pretend
    forget()


def forget():
    choice.backend.cache_clear()
    choice.serving.cache_clear()


@pytest.mark.parametrize(
    "capability, call, names, taken",
    (
        ((9, 0), ALIGNED_LOSS, EVERYTHING, "cuda"),
        ((10, 0), ALIGNED_LOSS, EVERYTHING, "cuda"),
        ((8, 9), ALIGNED_LOSS, EVERYTHING, "triton"),
        ((9, 0), LOSS, EVERYTHING, "triton"),
        ((9, 0), ROWS, EVERYTHING, "triton"),
        ((9, 0), ALIGNED_LOSS, ("reference", "triton"), "triton"),
        ((9, 0), ALIGNED_LOSS, ("reference",), "reference"),
        ((9, 0), LOSS, ("reference", "cuda"), "cuda"),
        ((9, 0), ROWS, ("reference", "cuda"), "cuda"),
        ((8, 0), ROWS, ("reference",), "reference"),
    ),
)
def test_auto_on_a_gpu(can_serve, capability, call, names, taken):
    can_serve(names, capability)
    assert choice.backend("auto", GPU, *call).name == taken


def test_auto_elsewhere(can_serve):
    can_serve(EVERYTHING)
    assert {choice.backend("auto", CPU, *call).name for call in (ROWS, LOSS, ALIGNED_LOSS)} == {
        "cpu"
    }
    can_serve(EVERYTHING, cuda=None)  # the device of a build for AMD is called cuda too
    assert choice.backend("auto", GPU, *ALIGNED_LOSS).name == "triton"


@pytest.mark.parametrize("call", (ROWS, LOSS, ALIGNED_LOSS))
def test_a_backend_by_name_is_that_one_or_an_error(can_serve, call):
    can_serve(("reference", "triton"))
    assert choice.backend("triton", GPU, *call).name == "triton"
    for _ in range(2):  # that it cannot serve is not remembered either
        with pytest.raises(ValueError, match="impl='cuda' cannot be used: it is gone"):
            choice.backend("cuda", GPU, *call)


def test_what_can_serve_is_looked_up_once(can_serve, monkeypatch):
    can_serve(EVERYTHING)
    asked, why_not = [], choice.why_not
    monkeypatch.setattr(choice, "why_not", lambda *a: asked.append(a) or why_not(*a))
    for _ in range(3):
        choice.backend("auto", GPU, "loss", True)
        assert [able.name for able in choice.serving(GPU)] == ["cpu", "triton", "cuda"]
    assert [name for name, _ in asked] == ["cuda", "cpu", "triton", "cuda"]


@pytest.fixture
def asked(monkeypatch):
    """The choices that the operators ask for."""
    calls = []

    def record(impl, device, *call):
        calls.append(call)
        return real(impl, device, *call)

    real = serve.backend
    monkeypatch.setattr(serve, "backend", record)
    return calls


def test_statistics_and_their_gradient_are_one_choice(asked):
    logits = random_logits(4, 64).requires_grad_()
    stats = softmax_stats(logits, random_target(4, vocab=64))
    stats.entropy.sum().backward()
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(64, 8)
    linear_softmax_stats(hidden, weight, random_target(4, vocab=64)).logprob.sum().backward()
    linear_entropy_loss(hidden, weight)
    assert len(asked) == 5 and set(asked) == {("rows",)}


STORAGE = torch.zeros(4, 3, 72, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "logits, aligned",
    (
        (STORAGE, True),
        (STORAGE[:, :-1], True),
        (STORAGE[..., :64], True),
        (STORAGE[..., 8:], True),
        (STORAGE[..., 4:68], False),  # begins at 8 bytes
        (STORAGE[..., :71], False),  # so does no row of a gradient
        (STORAGE.view(4, 2, 108)[..., :104], False),
        (STORAGE.view(4, 2, 108)[:, 0, :104], True),
        (STORAGE.view(3, 4, 72).double(), True),
        (torch.zeros(2, 3), False),
    ),
)
def test_a_loss_says_whether_rows_begin_at_16_bytes(asked, logits, aligned):
    logits = logits.detach().requires_grad_()
    entropy_loss(logits)
    token_loss(logits, entropy_weight=torch.ones(logits.shape[:-1]), inplace=True)
    assert asked == [("loss", aligned)] * 2


def test_no_backend_that_multiplies_by_itself(monkeypatch):
    monkeypatch.delitem(choice.OPTIONAL, "triton")
    with pytest.raises(ValueError, match="fuse_product=True needs a backend that multiplies by it"):
        choice.fusing(CPU)


def test_what_a_backend_leaves_out_is_left_to_its_callers():
    plain, x, spec = Reference(), torch.ones(1, 2, 5), RowSpec(valid_vocab=5)
    assert plain.local is plain and plain.part_entries is plain.widest_shard is None
    assert plain.empty((2, 3), torch.bfloat16, CPU).shape == (2, 3)
    assert not plain.scale_(x, torch.tensor(2.0)) and (x == 1).all()
    assert not plain.add_product(torch.ones(5, 4), x[0], torch.ones(2, 4), True)
    assert plain.count_present(x, spec, None) is None
    assert plain.find_temperature(x, Goal(0.3, 0.0, 0.05, 3)) is None
    assert plain.descend(x, Descent(0.3, 1.0, 2)) is None
    for asked in (
        lambda: plain.new_parts(2),
        lambda: plain.part_stats(x, spec, (), torch.ones(2), 0),
        lambda: plain.linear_stats(x[0], x[0], spec, ()),
    ):
        with pytest.raises(RuntimeError, match="reference"):
            asked()


def test_a_backend_has_statistics_gradient_and_loss():
    class Half(Backend):
        name = "half"
        stats, grad = Reference.stats, Reference.grad

    with pytest.raises(TypeError, match="loss"):
        Half()
