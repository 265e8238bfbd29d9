"""The log-probability, the rank and the gradient of K ids a row, on every backend."""

import pytest
import torch
from helpers import IMPLS, error, gradient, random_logits, rows_of_entropy, same_bits, transformed

from em_kernels import linear_softmax_stats, linear_token_loss, softmax_stats, token_loss

EACH_IMPL = pytest.mark.parametrize("impl", IMPLS)
N, V, D, K = 7, 61, 8, 5
ASKED = ("logprob", "entropy", "lse", "is_top1", "rank")
INF = float("inf")
TRANSFORMS = {
    "plain": {},
    "scaled": dict(temperature=0.7),
    "everything": dict(temperature=torch.linspace(0.5, 2, N), softcap=5.0, logit_scale=-0.5),
    "padded": dict(valid_vocab=V - 4),
}


def ids_of(rows=N, vocab=V - 4):
    """Repeated ids, a row of one id, padding."""
    ids = torch.randint(0, vocab, (rows, K))
    ids[0, 1] = ids[0, 3] = ids[0, 0]
    ids[1] = 3
    ids[2, 2:] = -100
    ids[3] = -100
    return ids


def exact(x, ids, **transform):
    """The definition in float64."""
    z = transformed(x, **transform)
    log_p = torch.log_softmax(z, -1)
    safe = ids.clamp(min=0)
    at = z.gather(-1, safe)
    counted = ids >= 0
    return {
        "logprob": torch.where(counted, log_p.gather(-1, safe), 0),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "lse": torch.logsumexp(z, -1),
        "is_top1": (z.argmax(-1, keepdim=True) == ids) & counted,
        "rank": (z[..., None, :] > at[..., None]).sum(-1) * counted,
    }


def weights_of(rows=N, dtype=torch.float32, device="cpu"):
    shapes = {"logprob": (rows, K), "entropy": (rows,), "lse": (rows,)}
    return {k: torch.randn(shape).to(dtype).to(device) for k, shape in shapes.items()}


def check(stats, want, slack):
    for name, value in want.items():
        got = getattr(stats, name)
        assert got.shape == value.shape, name
        if got.is_floating_point():
            assert error(got, value) < slack, name
        else:
            assert torch.equal(got.cpu(), value.cpu()), name


@EACH_IMPL
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_equals_the_definition(impl, device, dtype, transform):
    x = random_logits(N, V, dtype=dtype, device=device).requires_grad_()
    ids = ids_of().to(device)
    transform = {k: v.to(device) if torch.is_tensor(v) else v for k, v in transform.items()}
    stats = softmax_stats(x, ids, outputs=ASKED, impl=impl, **transform)
    wide = x.detach().double().requires_grad_()
    want = exact(wide, ids, **transform)
    slack = 1e-12 if dtype == torch.float64 else 2e-6
    check(stats, want, slack)
    upstream = weights_of(dtype=stats.logprob.dtype, device=device)
    got = gradient(stats._asdict(), upstream, x)[0]
    assert error(got, gradient(want, upstream, wide)[0]) < (4e-3 if dtype.itemsize == 2 else slack)
    given = dict(logprob_weight=upstream["logprob"], entropy_weight=upstream["entropy"])
    loss, made = token_loss(x, ids, outputs=ASKED, impl=impl, **given, **transform)
    check(made, {name: getattr(stats, name) for name in ASKED}, slack)
    del upstream["lse"]
    want = exact(wide, ids, **transform)
    total = sum((g.double() * want[name]).sum() for name, g in upstream.items())
    assert error(loss, total) < 10 * slack
    want_grad = torch.autograd.grad(total, wide)[0]
    assert error(torch.autograd.grad(loss, x)[0], want_grad) < (
        4e-3 if dtype.itemsize == 2 else slack
    )


@EACH_IMPL
@pytest.mark.parametrize("chunk", (None, 3))
@pytest.mark.parametrize("mask", (False, True), ids=("all", "some"))
@pytest.mark.parametrize("keep", (0, None))
def test_from_hidden_states(impl, device, chunk, mask, keep):
    hidden = random_logits(N, D, scale=1.0, device=device).requires_grad_()
    weight = random_logits(V, D, scale=1.0, device=device).requires_grad_()
    bias = random_logits(V, device=device).requires_grad_()
    ids, inputs = ids_of().to(device), (hidden, weight, bias)
    counted = torch.arange(N, device=device) % 3 > 0 if mask else torch.ones(N, device=device) > 0
    options = dict(bias=bias, chunk_tokens=chunk, mask=counted, softcap=6.0, impl=impl)
    stats = linear_softmax_stats(hidden, weight, ids, outputs=ASKED, keep_logits=keep, **options)
    wide = [x.detach().double().requires_grad_() for x in inputs]

    def expected():
        want = exact(wide[0] @ wide[1].T, ids, bias=wide[2], softcap=6.0)
        return {
            name: torch.where(counted.view(-1, *[1] * (x.dim() - 1)), x, 0).to(x.dtype)
            for name, x in want.items()
        }

    want = expected()
    check(stats, want, 2e-6)
    upstream = weights_of(device=device)
    got = gradient(stats._asdict(), upstream, *inputs)
    for mine, ref in zip(got, gradient(want, upstream, *wide)):
        assert error(mine, ref) < 5e-6
    loss, made = linear_token_loss(
        hidden,
        weight,
        ids,
        outputs=ASKED,
        logprob_weight=upstream["logprob"],
        entropy_weight=upstream["entropy"],
        **options,
    )
    check(made, want, 2e-6)
    want = expected()
    del upstream["lse"]
    for mine, ref in zip(torch.autograd.grad(loss, inputs), gradient(want, upstream, *wide)):
        assert error(mine, ref) < 5e-6


@EACH_IMPL
@pytest.mark.parametrize("from_hidden", (False, True))
def test_one_id_has_the_bits_of_a_target(impl, device, from_hidden):
    x = random_logits(N, V, device=device)
    weight = random_logits(V, V, device=device, scale=0.3)
    target = torch.randint(0, V, (N,), device=device)
    upstream = weights_of(device=device)
    upstream["logprob"] = upstream["logprob"][:, 0]
    results = []
    for given in (target, target[:, None]):
        leaf = x.clone().requires_grad_()
        g = upstream["logprob"].view(given.shape)
        options = dict(outputs=("logprob", "entropy", "lse", "is_top1"), impl=impl)
        if from_hidden:
            stats = linear_softmax_stats(leaf, weight, given, **options)
            loss = linear_token_loss(leaf, weight, given, logprob_weight=g, impl=impl).loss
        else:
            stats = softmax_stats(leaf, given, **options)
            loss = token_loss(leaf, given, logprob_weight=g, impl=impl).loss
        assert stats.logprob.shape == stats.is_top1.shape == given.shape
        made = gradient(stats._asdict(), {**upstream, "logprob": g}, leaf)[0]
        rows = [stats.logprob.flatten(), stats.entropy, stats.is_top1.flatten()]
        results.append([*rows, made, loss, torch.autograd.grad(loss, leaf)[0]])
    for one, ids in zip(*results):
        assert same_bits(one.float(), ids.float())


@EACH_IMPL
def test_padding_of_one_id_does_not_leave_the_row_out(impl, device):
    x = random_logits(2, V, device=device).requires_grad_()
    stats = softmax_stats(x, torch.tensor([[-100], [3]]).to(device), impl=impl)
    assert stats.logprob[0, 0] == 0 and (stats.entropy > 0).all()
    (grad,) = torch.autograd.grad(stats.logprob.sum(), x)
    assert (grad[0] == 0).all() and (grad[1] != 0).any()


@EACH_IMPL
@pytest.mark.parametrize("entropy", (1e-9, 1e-6, 1e-3))
def test_rows_that_are_nearly_certain(impl, device, entropy):
    """Relative accuracy of logprob and of its gradient, in float32, down to -1e-9."""
    x = rows_of_entropy(torch.full((3,), entropy), 40).to(device).requires_grad_()
    wide = x.detach().double().requires_grad_()
    top = x.argmax(-1)
    ids = torch.stack([top, (top + 1) % 40, top], -1)
    stats = softmax_stats(x, ids, outputs=("logprob", "entropy"), impl=impl)
    z = wide - wide.amax(-1, keepdim=True)
    others = torch.where(torch.arange(40, device=device) == top[:, None], -INF, z)
    log_p = z.gather(-1, ids) - torch.log1p(others.exp().sum(-1, keepdim=True))
    assert ((stats.logprob / log_p - 1).abs() < 1e-5).all()
    assert -stats.logprob[:, 0].max() < entropy
    got = torch.autograd.grad(stats.logprob[:, 0].sum(), x, retain_graph=True)[0]
    want = torch.autograd.grad(log_p[:, 0].sum(), wide)[0]
    at = got.gather(1, top[:, None]) / want.gather(1, top[:, None])
    assert ((at - 1).abs() < 1e-5).all()


@EACH_IMPL
def test_edges(impl, device):
    x = random_logits(5, V, device=device)
    x[0, 3], x[1, 4], x[2] = -INF, float("nan"), -INF
    x = x.requires_grad_()
    ids = torch.tensor([[3, 5]] * 5).to(device)
    mask = torch.tensor([1, 1, 1, 0, 1]).to(device)
    stats = softmax_stats(x, ids, outputs=ASKED, mask=mask, impl=impl)
    assert stats.logprob[0, 0] == -INF and stats.logprob[0, 1].isfinite()
    assert stats.logprob[1:3].isnan().all() and not stats.is_top1[1:3].any()
    assert (stats.rank[1:3] == -1).all() and stats.rank[0, 0] == V - 1
    assert (stats.logprob[3] == 0).all() and (stats.rank[3] == 0).all()
    stats.logprob[[0, 3, 4], 1].sum().backward()
    assert x.grad[[0, 4]].isfinite().all() and (x.grad[3] == 0).all()


@EACH_IMPL
def test_padding_is_nan_in_a_row_that_is(impl, device):
    x = random_logits(2, V, device=device)
    x[0, 1] = float("nan")
    for ids in ([[-100]] * 2, [[-100, 2]] * 2):
        stats = softmax_stats(x, torch.tensor(ids, device=device), outputs=ASKED, impl=impl)
        assert stats.logprob[0].isnan().all() and (stats.rank[0] == -1).all()
        assert stats.logprob[1, 0] == 0 and stats.rank[1, 0] == 0


def test_first_and_second_derivatives():
    x = random_logits(3, 11, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 3, 3], [4, 4, 4], [10, -100, 1]])

    def outputs(x):
        stats = softmax_stats(x, ids, temperature=0.8, softcap=4.0)
        return stats.logprob, stats.entropy

    assert torch.autograd.gradcheck(outputs, x)
    assert torch.autograd.gradgradcheck(outputs, x)


def test_compiled():
    x, ids = random_logits(N, V).requires_grad_(), ids_of()

    def call(x):
        stats = softmax_stats(x, ids, outputs=ASKED)
        return stats.logprob.sum() + stats.rank.sum() + stats.entropy.sum()

    want = torch.autograd.grad(call(x), x)[0]
    got = torch.autograd.grad(torch.compile(call, fullgraph=True, backend="aot_eager")(x), x)[0]
    assert error(got, want) < 1e-6


def test_bad_ids_are_told():
    x = random_logits(N, V)
    with pytest.raises(ValueError, match=r"target must be in \[0, 61\).*got 61 at token 4"):
        softmax_stats(x, ids_of().index_fill(0, torch.tensor(4), 61))
    with pytest.raises(ValueError, match="target must have an id in every row"):
        softmax_stats(x, torch.zeros(N, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="'entropy_slope' is of one id a row"):
        softmax_stats(x, ids_of(), outputs=("entropy_slope",))
    with pytest.raises(ValueError, match=r"logprob_weight must have shape \(7, 5\)"):
        token_loss(x, ids_of(), logprob_weight=torch.ones(N))
    with pytest.raises(TypeError, match="target must be int64"):
        softmax_stats(x, ids_of().int())
    assert softmax_stats(x[:0], ids_of()[:0]).logprob.shape == (0, K)
