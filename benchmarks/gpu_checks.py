"""The checks of `benchmarks.gpu_smoke`: each takes the name of a backend, and gives whether it is
right and what it found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_truth import (
    DEVICE,
    ROUNDING,
    certain_rows,
    draw,
    draw_hidden,
    off,
    truth,
    worst,
)
from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    softmax_stats,
    token_loss,
)
from em_kernels.backends.interface import DIFFERENTIABLE, ROW_OUTPUTS
from em_kernels.inference import AdaptiveTemperature, EntropyDescent
from em_kernels.linear.products import addmm_wide, adds_to_float32, mm_wide

N, V = 8192, 151936
ODD = 151665  # no multiple of anything a vector load wants
ROWS = 64  # where float64 truth of whole rows is wanted


def statistics(dtype: torch.dtype, vocab: int, temperature: float = 1.0, outputs=ROW_OUTPUTS):
    def check(impl: str):
        x, target = draw(ROWS, vocab, dtype)
        leaf, exact = (x.clone().requires_grad_() for _ in range(2))
        options = dict(outputs=outputs, temperature=temperature, impl=impl)
        stats = softmax_stats(leaf, target, **options)._asdict()
        expected = truth(exact, target, temperature)
        upstream = {name: torch.randn(ROWS, device=DEVICE).double() for name in DIFFERENTIABLE}
        total = sum((upstream[name].to(stats[name].dtype) * stats[name]).sum() for name in upstream)
        (grad,) = torch.autograd.grad(total, leaf)
        (grad_truth,) = torch.autograd.grad(
            sum((upstream[name] * expected[name]).sum() for name in upstream), exact
        )
        # Those near 0 are held to what they are made of: the spread of the row, and its cube.
        scales = {"logit_mean": expected["logit_var"].sqrt(), "logit_skew": torch.ones(())}
        errors = {name: off(stats[name], expected[name], scales.get(name)) for name in outputs}
        errors["grad"] = off(grad, grad_truth)
        wide = dtype == torch.float64
        return worst(errors, 1e-10 if wide else 1e-5, ROUNDING[dtype])

    return check


def certain(temperature: float):
    """Relative errors of H and of its gradient, row by row: the library's first promise."""

    def check(impl: str):
        wanted = [1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-2, 0.1, 1.0, 5.0, 8.0]
        x = (certain_rows(wanted) * temperature).float()
        target = x.argmax(-1)
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        stats = softmax_stats(leaf, target, temperature=temperature, impl=impl)
        (grad,) = torch.autograd.grad(stats.entropy.sum(), leaf, retain_graph=True)
        expected = truth(exact, target, temperature)
        (grad_truth,) = torch.autograd.grad(expected["entropy"].sum(), exact)
        loss = entropy_loss(leaf, reduction="sum", temperature=temperature, impl=impl)
        (of_loss,) = torch.autograd.grad(loss, leaf)
        of_h = (stats.entropy / expected["entropy"] - 1).abs()
        of_grad = [off(g, t) for g, t in zip(grad, grad_truth)]
        of_loss = [off(g, t) for g, t in zip(of_loss, grad_truth)]
        above = stats.logprob.max().item()
        each = "; ".join(
            f"H={h:.0e}: {a:.1e} {b:.1e} {c:.1e}"
            for h, a, b, c in zip(wanted, of_h.tolist(), of_grad, of_loss)
        )
        good = of_h.max() <= 1e-5 and max(of_grad + of_loss) <= 2e-5 and above <= 0
        return good, f"(H, gradient, of loss) {each}; largest logprob {above:.1e}"

    return check


def vast(dtype: torch.dtype, **options: float):
    """Logits of 3e38 at options that take z beyond float32: their softmax is plain."""

    def check(impl: str):
        x, target = draw(ROWS, ODD, dtype)
        for row in range(ROWS):
            x[row, 1000 : 1001 + row] = 3e38
        target[::2] = 1000
        x = x if options.get("logit_scale", 1) > 0 else -x
        leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
        names = ("logprob", "entropy", "lse", "logit_skew")
        stats = softmax_stats(leaf, target, outputs=names, impl=impl, **options)
        factor = options.get("temperature", 1) / options.get("logit_scale", 1)
        expected = truth(exact, target, factor)
        known = expected["logprob"].float().isfinite()
        weights = torch.randn(2, ROWS, device=DEVICE).double()
        of_all = [
            (of["entropy"] * weights[0] + of["logprob"] * weights[1])[known].sum()
            for of in (stats._asdict(), expected)
        ]
        (grad,) = torch.autograd.grad(of_all[0], leaf)
        (grad_truth,) = torch.autograd.grad(of_all[1], exact)
        errors = {
            name: off(getattr(stats, name)[known], expected[name][known])
            for name in ("logprob", "entropy", "logit_skew")
        }
        errors["grad"] = off(grad, grad_truth)
        good, said = worst(errors, 1e-5, ROUNDING[dtype])
        beyond = bool(stats.lse.isinf().all()) and bool(stats.logprob[~known].isinf().all())
        return good and beyond, f"{said}; infinite beyond float32: {beyond}"

    return check


def loss_twice(impl: str):
    """At full size: the same bits twice, and each row as statistics and float64 say."""
    x, target = draw(N, V, torch.bfloat16)
    weights = dict(entropy_weight=torch.rand(N, device=DEVICE) / N)
    weights["logprob_weight"] = torch.randn(N, device=DEVICE) / N
    leaf, runs = x.requires_grad_(), []
    for _ in range(2):
        result = token_loss(leaf, target, impl=impl, **weights)
        runs.append((result, torch.autograd.grad(result.loss, leaf)[0]))
    (first, grad), (second, again) = runs
    same = torch.equal(first.loss, second.loss) and torch.equal(grad, again)
    same = same and torch.equal(first.stats.entropy, second.stats.entropy)
    del runs, again
    index = torch.linspace(0, N - 1, ROWS, device=DEVICE).long()
    exact = x.detach()[index].double().requires_grad_()
    expected = truth(exact, target[index])
    total = sum(
        (weights[f"{name}_weight"][index].double() * expected[name]).sum()
        for name in ("entropy", "logprob")
    )
    (grad_truth,) = torch.autograd.grad(total, exact)
    errors = {
        name: off(getattr(first.stats, name)[index], expected[name])
        for name in ("entropy", "logprob")
    }
    errors["grad"] = off(grad[index], grad_truth)
    other = "triton" if impl == "cuda" else "reference"
    apart = against(other, x.detach(), target, weights, first, grad)
    errors |= {f"{name} of all rows against {other}": error for name, error in apart.items()}
    good, said = worst(errors, 1e-5, ROUNDING[torch.bfloat16])
    return good and same, f"same bits twice: {same}; {said}"


def against(impl: str, x: Tensor, target: Tensor, weights: dict, result, grad: Tensor):
    """Every row's statistics and gradient beside those of another backend, 512 rows at a time."""
    squares = torch.zeros(3, 2, device=DEVICE).double()
    for part in torch.arange(len(x), device=DEVICE).split(512):
        leaf = x[part].requires_grad_()
        given = {name: weight[part] for name, weight in weights.items()}
        other = token_loss(leaf, target[part], impl=impl, **given)
        ours = result.stats.entropy[part], result.stats.logprob[part], grad[part]
        theirs = other.stats.entropy, other.stats.logprob, torch.autograd.grad(other.loss, leaf)[0]
        for square, a, b in zip(squares, ours, theirs):
            square += torch.stack([(a.float() - b.float()).norm(), b.float().norm()]).double() ** 2
    errors = (squares[:, 0] / squares[:, 1]).sqrt().tolist()
    return dict(zip(("entropy", "logprob", "gradient"), errors))


def masked(impl: str):
    x, target = draw(ROWS, ODD, torch.bfloat16)
    mask = torch.arange(ROWS, device=DEVICE) % 3 > 0
    ignored = torch.where(mask, target, -100)
    leaf = x.requires_grad_()
    results = []
    for arguments in ((target, mask), (ignored, None), (target, None)):
        stats = softmax_stats(leaf, arguments[0], mask=arguments[1], impl=impl)
        total = (stats.entropy + stats.logprob).sum()
        results.append((stats.entropy.detach(), torch.autograd.grad(total, leaf)[0]))
    (h, g), (h2, g2), (h3, g3) = results
    good = torch.equal(h, h2) and torch.equal(g, g2) and (g[~mask] == 0).all()
    good = good and (h[~mask] == 0).all() and torch.equal(h[mask], h3[mask])
    return bool(good and torch.equal(g[mask], g3[mask])), "rows left out are 0, others unchanged"


def strided(impl: str):
    """Row-strided views that begin at an odd element: the same as a copy of them."""
    whole = draw(ROWS, V, torch.bfloat16)[0]
    view = whole[:, 1 : ODD + 1]
    target = torch.randint(0, ODD, (ROWS,), device=DEVICE)
    errors = {}
    for name, x in (("view", view), ("copy", view.clone())):
        leaf = x.detach().requires_grad_()
        stats = softmax_stats(leaf, target, impl=impl)
        (grad,) = torch.autograd.grad((stats.entropy + stats.logprob).sum(), leaf)
        errors[name] = (stats.entropy.detach(), grad)
    same = all(map(torch.equal, errors["view"], errors["copy"]))
    return same, f"same bits as of a copy: {same}"


def transforms(impl: str):
    x, target = draw(ROWS, ODD, torch.float32)
    t = 0.5 + torch.rand(ROWS, device=DEVICE)
    options = dict(softcap=15.0, logit_scale=0.7, valid_vocab=ODD - 17, temperature=t)
    target %= ODD - 17
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    stats = softmax_stats(leaf, target, impl=impl, **options)
    z = 15.0 * torch.tanh(0.7 * exact / 15.0) / t.double()[:, None]
    expected = truth(z[:, : ODD - 17], target)
    (grad,) = torch.autograd.grad((stats.entropy + stats.logprob).sum(), leaf)
    (exact_grad,) = torch.autograd.grad((expected["entropy"] + expected["logprob"]).sum(), exact)
    errors = {name: off(getattr(stats, name), expected[name]) for name in ("entropy", "logprob")}
    errors["grad"] = off(grad, exact_grad)
    return worst(errors, 1e-5, 2e-5)


def bad_rows(impl: str):
    x, target = draw(8, ODD, torch.float32)
    x[0, 5], x[1, 7], x[2], target[3] = float("nan"), float("inf"), -float("inf"), ODD
    x[4, 100:] = -float("inf")
    target[4] = 3
    stats = softmax_stats(x, target, impl=impl)
    nan = stats.entropy.isnan()
    good = nan.tolist()[:3] == [True] * 3 and not nan[4:].any() and stats.logprob[3].isnan()
    return bool(good), f"NaN where it should be: {nan.tolist()}"


def graph_of(function: Callable[[], tuple[Tensor, ...]], change: Callable[[], None]):
    """The bits of a replayed CUDA graph, after `change`, against those of the call itself."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function()
    change()
    graph.replay()
    torch.cuda.synchronize()
    replayed = [x.clone() for x in captured]
    same = all(map(torch.equal, replayed, function()))
    return same, f"same bits as the call: {same}"


def graph_of_logits(impl: str):
    x, target = draw(ROWS, V, torch.bfloat16)
    other, leaf = draw(ROWS, V, torch.bfloat16)[0], x.clone().requires_grad_()
    weights = torch.rand(ROWS, device=DEVICE)

    def function():
        loss = token_loss(leaf, entropy_weight=weights, impl=impl).loss
        stats = softmax_stats(leaf, target, impl=impl)
        total = (stats.entropy + stats.logprob).sum()
        return loss, *torch.autograd.grad(loss, leaf), *torch.autograd.grad(total, leaf)

    def change():
        with torch.no_grad():
            leaf.copy_(other)

    return graph_of(function, change)


def graph_of_hidden(impl: str):
    ones = torch.ones(512, device=DEVICE)
    hidden, weight, target = draw_hidden(512, 256, 8192, torch.bfloat16)
    other, target[::5] = torch.randn_like(hidden), -100

    def function():
        loss = linear_entropy_loss(hidden, weight, impl=impl)
        stats = linear_softmax_stats(hidden, weight, target, impl=impl)
        weighed = linear_token_loss(hidden, weight, target, logprob_weight=-ones, impl=impl)
        values = loss, (stats.logprob + stats.entropy).sum(), weighed.loss
        grads = [g for v in values for g in torch.autograd.grad(v, (hidden, weight))]
        return *values, *grads

    def change():
        with torch.no_grad():
            hidden.copy_(other)

    return graph_of(function, change)


def side_stream(impl: str):
    x, target = draw(1024, V, torch.bfloat16)
    expected = softmax_stats(x, target, impl=impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # the logits are not there yet for some 25 ms
        late = x * 1
        stats = softmax_stats(late, target, impl=impl)
    stream.synchronize()
    same = torch.equal(stats.entropy, expected.entropy)
    return same and torch.equal(stats.logprob, expected.logprob), f"same bits: {same}"


def from_hidden(dtype: torch.dtype, rows: int, vocab: int, loss: bool, **options):
    def check(impl: str):
        hidden, weight, target = draw_hidden(rows, 512, vocab, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = torch.randn(2, rows, dtype=wide, device=DEVICE) / rows
        if loss:
            given = dict(entropy_weight=weights[0], logprob_weight=weights[1])
            result = linear_token_loss(hidden, weight, target, impl=impl, **given, **options)
            total, stats = result.loss, result.stats
        else:
            stats = linear_softmax_stats(hidden, weight, target, impl=impl, **options)
            total = (weights[0] * stats.entropy + weights[1] * stats.logprob).sum()
        grads = torch.autograd.grad(total, (hidden, weight))
        exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
        expected = truth(exact[0] @ exact[1].T, target)
        wanted = weights[0].double() * expected["entropy"]
        wanted = (wanted + weights[1].double() * expected["logprob"]).sum()
        exact_grads = torch.autograd.grad(wanted, exact)
        names = ("entropy", "logprob")
        errors = {name: off(getattr(stats, name), expected[name]) for name in names}
        errors["grad_hidden"] = off(grads[0], exact_grads[0])
        errors["grad_weight"] = off(grads[1], exact_grads[1])
        limit = 1e-10 if dtype == torch.float64 else 2e-5
        limits = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3}
        return worst(errors, limit, limits.get(dtype, 1e-2))

    return check


def fused(impl: str):
    hidden, weight, target = draw_hidden(1024, 512, 50257, torch.bfloat16)
    with torch.no_grad():
        stats = linear_softmax_stats(hidden, weight, target, fuse_product=True, impl=impl)
        expected = truth(hidden.double() @ weight.double().T, target)
    return worst(
        {name: off(getattr(stats, name), expected[name]) for name in ("entropy", "logprob")}, 2e-5
    )


def inplace(impl: str):
    x, _ = draw(256, V, torch.bfloat16)
    leaf = x.clone().requires_grad_()
    loss = entropy_loss(leaf, impl=impl)
    (grad,) = torch.autograd.grad(loss, leaf)
    memory = x.clone()
    spent = memory.requires_grad_()
    other = entropy_loss(spent * 1, inplace=True, impl=impl)
    (again,) = torch.autograd.grad(other, spent)
    same = torch.equal(grad, again) and torch.equal(loss, other)
    return same, f"same bits as into new memory: {same}"


def covariance(impl: str):
    hidden, weight, target = draw_hidden(512, 512, 32001, torch.bfloat16)
    advantage = torch.randn(512, device=DEVICE)
    with torch.no_grad():
        cov = linear_token_covariance(hidden, weight, target, advantage, impl=impl)
        logprob = truth(hidden.double() @ weight.double().T, target)["logprob"]
    expected = (logprob - logprob.mean()) * (advantage - advantage.mean()).double()
    return worst({"covariance": off(cov, expected)}, 2e-5)


def processors(impl: str):
    scores = draw(16, V, torch.float32)[0]
    with torch.inference_mode():
        low = EntropyDescent(0.3, steps=3, impl=impl)(None, scores)
        cold = AdaptiveTemperature(0.3, impl=impl)(None, scores)
        h = [softmax_stats(x, impl=impl).entropy for x in (scores, low, cold)]
    good = (h[1] <= h[0] + 1e-5).all() and (h[2] <= h[0] + 1e-5).all() and cold.isfinite().all()
    return bool(good), f"entropies {h[0].mean():.3f} to {h[1].mean():.3f} and {h[2].mean():.3f}"


def wide_products(impl: str):
    """16-bit operands and a float32 result: the product, and the product added to what is there."""
    a = torch.randn(256, 512, device=DEVICE).bfloat16()
    b, out = torch.randn(512, 384, device=DEVICE).bfloat16(), torch.empty(256, 384, device=DEVICE)
    exact = a.double() @ b.double()
    mm_wide(a, b, out)
    errors = {"mm_wide": off(out, exact)}
    adds = adds_to_float32(a.device, a.dtype)
    if adds:
        total = torch.randn(256, 384, device=DEVICE)
        expected = total.double() + exact
        addmm_wide(total, a, b)
        errors["addmm_wide"] = off(total, expected)
    good, said = worst(errors, 1e-5)
    return good, f"{said}; adds to float32: {adds}"
