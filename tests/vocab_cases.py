"""The calls of `test_vocab_parallel`, of whole rows or of one rank's shard of them.

A case is a function of a `Share` that returns (what must be the same on every rank, what is this
rank's part of a tensor cut in dimension `dim`: name -> (part, dim)).
"""

from __future__ import annotations

import math
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from contract.sizes import rows_of_any_size
from gpu_products import block_small_vocabularies, defer_small_chunks, play_gpu
from helpers import DIFFERENTIABLE, rows_of_entropy
from torch import Tensor

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    linear_top_logprobs,
    softmax_stats,
    token_covariance,
    token_loss,
    top_logprobs,
)
from em_kernels.backends import support
from em_kernels.backends.interface import OUTPUTS
from em_kernels.integrations import verl
from em_kernels.linear import vocab_blocks
from em_kernels.ops.checks import check_group
from em_kernels.ops.sources import copy_to_ranks

VOCAB = 63
SIZES = {2: (40, 23), 3: (30, 5, 28)}
INF, NAN = math.inf, math.nan


class Share(NamedTuple):
    """How much of the vocabulary this process holds."""

    group: object = None
    rank: int = 0
    sizes: tuple[int, ...] | None = None  # None is all of it

    def part(self, x: Tensor, dim: int = -1) -> Tensor:
        """This process's part of `x`: a leaf that asks for its gradient."""
        if self.sizes is not None:
            x = x.split(self.sizes, dim)[self.rank]
        return x.detach().clone().requires_grad_()


WHOLE = Share()


def own_share(sizes: tuple[int, ...] | None = None) -> Share:
    return Share(dist.group.WORLD, dist.get_rank(), sizes or SIZES[dist.get_world_size()])


def with_gradients(values: dict, upstream: dict, parts: dict, copies: dict | None = None):
    """(values and gradients of `copies`, gradients of `parts`: name -> (tensor, dim))."""
    copies = copies or {}
    loss = sum((upstream[name] * values[name]).sum() for name in upstream if name in values)
    leaves = [*copies.values(), *(x for x, _ in parts.values())]
    gradients = torch.autograd.grad(loss, leaves)
    same = {name: value.detach() for name, value in values.items()}
    same |= {f"d {name}": g for name, g in zip(copies, gradients)}
    own = {
        f"d {name}": (g, dim)
        for (name, (_, dim)), g in zip(parts.items(), gradients[len(copies) :])
    }
    return same, own


def draw_upstream(*shape, dtype=torch.float32):
    return {name: torch.randn(shape, dtype=dtype) for name in DIFFERENTIABLE}


def draw_rows(dtype=torch.float32, vocab=VOCAB):
    """Logits (2, 9, vocab) with targets all over the vocabulary, and upstream gradients."""
    torch.manual_seed(1)
    logits = (3 * torch.randn(2, 9, vocab)).to(dtype)
    target = torch.linspace(0, vocab - 1, 18).long().view(2, 9)
    logits[0, :4].scatter_(1, target[0, :4, None], 9.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return logits, target, draw_upstream(2, 9, dtype=wide)


def stats_case(share, logits, target, upstream, outputs=OUTPUTS, **kwargs):
    x = share.part(logits)
    stats = softmax_stats(x, target, outputs=outputs, group=share.group, **kwargs)._asdict()
    values = {name: stats[name] for name in outputs}
    return with_gradients(values, upstream, {"logits": (x, -1)})


def stats_of(dtype):
    def case(share, impl):
        return stats_case(share, *draw_rows(dtype), impl=impl)

    return case


def stats_with_everything(share, impl):
    logits, target, upstream = draw_rows()
    target %= VOCAB - 4
    target[0, 3] = -100
    return stats_case(
        share,
        logits,
        target,
        upstream,
        temperature=0.5 + torch.rand(2, 9),
        softcap=8.0,
        logit_scale=0.7,
        mask=torch.rand(2, 9) > 0.3,
        valid_vocab=VOCAB - 4,
        impl=impl,
    )


def stats_of_what_was_kept(dtype=torch.float32, **limits):
    """Ties at the borders in bfloat16; with ids, sets of every size."""

    def case(share, impl):
        logits, target, upstream = draw_rows(dtype)
        given = dict(limits)
        if not limits:
            kept = torch.rand(18, VOCAB) < torch.rand(18, 1)
            kept[:, 5] = True
            offsets = torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0))
            given["kept"] = kept.nonzero()[:, 1].contiguous(), offsets
        return stats_case(share, logits, target, upstream, temperature=0.8, impl=impl, **given)

    return case


def stats_in_pieces_of_rows(share, impl):
    """As many rows at a time on all ranks: of the widest shard."""
    with patch.dict(support.PIECE_BYTES, cpu=4 * 45 * 4):
        return stats_of_what_was_kept(top_k=4)(share, impl)


def stats_without_target(share, impl):
    logits, _, upstream = draw_rows()
    return stats_case(share, logits, None, upstream, ("entropy", "collision", "lse"), impl=impl)


def stats_of_a_view(share, impl):
    """logits[:, :-1], in a shard too."""
    logits, target, upstream = draw_rows()
    x = share.part(logits)
    stats = softmax_stats(x[:, :-1], target[:, 1:], group=share.group, impl=impl)
    upstream = {name: g[:, 1:] for name, g in upstream.items()}
    values = {"logprob": stats.logprob, "entropy": stats.entropy}
    return with_gradients(values, upstream, {"logits": (x, -1)})


def sure_rows():
    """Rows with an entropy of 1e-9 and more, the largest logit and the target in any place."""
    torch.manual_seed(2)
    entropies = torch.tensor([1e-9, 1e-8, 1e-7, 1e-6, 1e-3, 0.5], dtype=torch.float64).repeat(8)
    logits = rows_of_entropy(entropies, VOCAB)
    target = logits.argmax(-1)
    target[::3] = torch.randint(0, VOCAB, (16,))
    return logits, target, draw_upstream(48)


def stats_of_sure_rows(share, impl):
    return stats_case(share, *sure_rows(), impl=impl)


def stats_of_shifted_rows(share, impl):
    logits, target, upstream = draw_rows()
    names = ("logprob", "entropy", "varentropy", "collision", "max_prob", "is_top1")
    return stats_case(share, logits * 8 // 1 / 8 + 1e4, target, upstream, names, impl=impl)


def stats_of_rows_of_any_size(share, impl):
    torch.manual_seed(5)
    logits = rows_of_any_size(VOCAB, torch.float32, {})[0]
    target = torch.linspace(0, VOCAB - 1, len(logits)).long()
    upstream = draw_upstream(len(logits))
    return stats_case(share, logits, target, upstream, temperature=0.7, impl=impl)


def stats_of_bad_rows(share, impl):
    """Row by row: -inf in one shard, in all but one, in all; NaN; +inf; a target on -inf."""
    torch.manual_seed(3)
    logits, target = 3 * torch.randn(9, VOCAB), torch.randint(0, VOCAB, (9,))
    first = SIZES[3][0]
    logits[0, :first] = -INF
    logits[1, first:] = -INF
    logits[2] = -INF
    logits[3, 2] = NAN
    logits[4, VOCAB - 1] = INF
    logits[5, target[5]] = -INF
    logits[6, first + 5 :] = -INF
    logits[7, : first + 5] = -INF
    logits[7, VOCAB - 1] = NAN
    target[0], target[6] = 3, VOCAB - 2  # in a shard without a finite logit
    return stats_case(share, logits, target, draw_upstream(9), impl=impl)


def stats_with_a_shard_of_padding(share, impl):
    """valid_vocab leaves the last rank nothing."""
    logits, target, upstream = draw_rows()
    valid = 30
    return stats_case(share, logits, target % valid, upstream, valid_vocab=valid, impl=impl)


def kept_with_a_shard_of_nothing(share, impl):
    """The last rank has no entry, here where the others have all.

    In float64: of a few logits alone the skewness keeps fewer digits.
    """
    logits, target, upstream = draw_rows(torch.float64)
    sizes = None if share.sizes is None else (*share.sizes[:-2], sum(share.sizes[-2:]), 0)
    return stats_case(
        share._replace(sizes=sizes), logits, target, upstream, top_k=9, top_p=0.9, impl=impl
    )


def no_rows(share, impl):
    x = share.part(torch.zeros(0, VOCAB))
    stats = softmax_stats(x, torch.zeros(0, dtype=torch.int64), group=share.group, impl=impl)
    weight, hidden = share.part(torch.ones(VOCAB, 4), 0), torch.zeros(0, 4, requires_grad=True)
    loss = linear_entropy_loss(hidden, weight, group=share.group, impl=impl)
    values = {"entropy": stats.entropy, "loss": loss}
    upstream = {"entropy": torch.ones(0), "loss": torch.tensor(1.0)}
    return with_gradients(
        values, upstream, {"logits": (x, -1), "weight": (weight, 0)}, {"hidden": hidden}
    )


def all_rows_masked(share, impl):
    logits, target, upstream = draw_rows()
    return stats_case(share, logits, target, upstream, mask=torch.zeros(2, 9), impl=impl)


class Head(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def draw_head(share, dtype=torch.float32, dim=8):
    torch.manual_seed(4)
    hidden = torch.randn(2, 9, dim).to(dtype).requires_grad_()
    weight, bias = torch.randn(VOCAB, dim).to(dtype), torch.randn(VOCAB).to(dtype)
    target = torch.linspace(0, VOCAB - 1, 18).long().view(2, 9)
    return Head(hidden, share.part(weight, 0), share.part(bias, 0)), target


def head_gradients(values, upstream, head):
    parts = {"weight": (head.weight, 0), "bias": (head.bias, 0)}
    return with_gradients(values, upstream, parts, {"hidden": head.hidden})


def ids_of(target):
    """Five ids a row, repeated, on several ranks, and padding."""
    ids = torch.stack([target, (target + 31) % VOCAB, target, (target * 7) % VOCAB, target], -1)
    ids[0, :, 4] = -100
    return ids


OF_IDS = ("logprob", "entropy", "lse", "is_top1", "rank")


def stats_of_ids(share, impl):
    logits, target, upstream = draw_rows()
    upstream["logprob"] = torch.randn(2, 9, 5)
    return stats_case(share, logits, ids_of(target), upstream, OF_IDS, impl=impl, softcap=9.0)


def linear_loss_of_ids(share, impl):
    head, target = draw_head(share)
    loss, stats = linear_token_loss(
        head.hidden,
        head.weight,
        ids_of(target),
        bias=head.bias,
        logprob_weight=torch.randn(2, 9, 5),
        entropy_weight=torch.randn(2, 9),
        outputs=OF_IDS,
        chunk_tokens=4,
        group=share.group,
        impl=impl,
    )
    values = {"loss": loss, **{name: getattr(stats, name) for name in OF_IDS}}
    return head_gradients(values, {"loss": torch.tensor(1.0)}, head)


def likeliest(share, impl):
    """Ties within and between shards, a rank without entries, more than a rank has."""
    logits, _, _ = draw_rows()
    x = share.part(logits * 2 // 1 / 2)
    head, _ = draw_head(share)
    common = dict(mask=torch.rand(2, 9) > 0.2, group=share.group, impl=impl)
    options = dict(bias=head.bias, temperature=0.7, chunk_tokens=4, **common)
    found = {
        "few": top_logprobs(x, 3, **common),
        "many": top_logprobs(x, 35, softcap=9.0, **common),
        "first": top_logprobs(x, 33, valid_vocab=33, **common),
        "linear": linear_top_logprobs(head.hidden, head.weight, 5, **options),
    }
    return {f"{k} {name}": v for k, t in found.items() for name, v in t._asdict().items()}, {}


def linear_stats_of(dtype, **options):
    def case(share, impl):
        head, target = draw_head(share, dtype)
        target[1, 4] = -100
        stats = linear_softmax_stats(
            head.hidden,
            head.weight,
            target,
            bias=head.bias,
            outputs=OUTPUTS,
            temperature=0.7,
            mask=torch.rand(2, 9) > 0.2,
            group=share.group,
            impl=impl,
            **options,
        )._asdict()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return head_gradients(stats, draw_upstream(2, 9, dtype=wide), head)

    return case


def linear_stats_in_blocks(dtype, **options):
    """Backward with blocks of the shard outermost; in bfloat16 as on a GPU."""
    stats = linear_stats_of(dtype, **options)

    def case(share, impl):
        with pytest.MonkeyPatch.context() as patch:
            block_small_vocabularies(patch)
            products = play_gpu(patch) if dtype == torch.bfloat16 else []
            blocks, column_blocks = [], vocab_blocks.column_blocks
            patch.setattr(
                vocab_blocks,
                "column_blocks",
                lambda *sizes: blocks.append(column_blocks(*sizes)) or blocks[-1],
            )
            results = stats(share, impl)
        own = VOCAB if share.sizes is None else share.sizes[share.rank]
        assert blocks or own == 0, "rows were outermost"
        assert own < 20 or len(blocks[0]) > 1
        assert products or dtype != torch.bfloat16
        return results

    return case


def linear_stats_of_a_frozen_head(share, impl):
    """The gradient of hidden is made in the forward pass: each rank's share, summed in backward."""
    head, target = draw_head(share)
    target[1, 4] = -100
    stats = linear_softmax_stats(
        head.hidden,
        head.weight.detach(),
        target,
        bias=head.bias.detach(),
        entropy_requires_grad=False,
        chunk_tokens=5,
        group=share.group,
        impl=impl,
    )
    values = {"logprob": stats.logprob, "entropy": stats.entropy}
    upstream = {"logprob": draw_upstream(2, 9)["logprob"]}
    return with_gradients(values, upstream, {}, {"hidden": head.hidden})


def linear_with_a_bias_of_minus_inf(share, impl):
    """Padding by bias: the last shard has no finite logit in any row."""
    head, target = draw_head(share)
    bias = torch.zeros(VOCAB)
    bias[VOCAB // 2 - 1 :] = -INF
    bias = share.part(bias, 0)
    stats = linear_softmax_stats(
        head.hidden,
        head.weight,
        target % 30,
        bias=bias,
        outputs=OUTPUTS,
        group=share.group,
        chunk_tokens=5,
        impl=impl,
    )._asdict()
    return head_gradients(stats, draw_upstream(2, 9), head._replace(bias=bias))


def verl_head(share, impl):
    """verl's signature; its backend is chosen by the device, so `impl` plays no part. The gradient
    it leaves partial is summed by what comes before it, as in verl."""
    head, target = draw_head(share)
    hidden = copy_to_ranks(head.hidden, check_group(share.group))
    target.view(-1)[:2] = torch.tensor([-1, -100])  # no entries of the vocabulary
    arguments = (hidden, head.weight, target, 0.7, "none", share.group)
    values = dict(zip(("logprob", "entropy"), verl.linear_cross_entropy(*arguments)))
    return with_gradients(
        values, draw_upstream(18), {"weight": (head.weight, 0)}, {"hidden": head.hidden}
    )


def loss_case(inplace):
    def case(share, impl):
        logits, target, _ = draw_rows()
        x = share.part(logits)
        result = token_loss(
            x * 1,
            target,
            entropy_weight=torch.rand(2, 9),
            logprob_weight=torch.rand(2, 9) - 0.5,
            outputs=OUTPUTS,
            mask=torch.rand(2, 9) > 0.3,
            temperature=0.5,
            inplace=inplace,
            group=share.group,
            impl=impl,
        )
        values = {"loss": result.loss, **result.stats._asdict()}
        return with_gradients(values, {"loss": torch.tensor(2.0)}, {"logits": (x, -1)})

    return case


def linear_loss_of(dtype, frozen=(), **options):
    def case(share, impl):
        head, target = draw_head(share, dtype)
        target %= options.get("valid_vocab", VOCAB)
        for name in frozen:
            getattr(head, name).requires_grad_(False)
        result = linear_token_loss(
            head.hidden,
            head.weight,
            target,
            bias=head.bias,
            entropy_weight=torch.rand(2, 9),
            logprob_weight=torch.rand(2, 9) - 0.5,
            mask=torch.rand(2, 9) > 0.3,
            group=share.group,
            impl=impl,
            **options,
        )
        values = {"loss": result.loss, **result.stats._asdict()}
        values = {name: value for name, value in values.items() if value is not None}
        if len(frozen) == len(head):
            return values, {}
        parts = {
            name: (getattr(head, name), 0) for name in ("weight", "bias") if name not in frozen
        }
        copies = {} if "hidden" in frozen else {"hidden": head.hidden}
        return with_gradients(values, {"loss": torch.tensor(2.0)}, parts, copies)

    return case


def linear_loss_into(share, impl):
    """A bfloat16 head over float32 hidden states, its gradient added to float32."""
    head, target = draw_head(share)
    weight = head.weight.detach().bfloat16().requires_grad_()
    into = torch.ones(weight.shape)
    result = linear_token_loss(
        head.hidden,
        weight,
        target,
        bias=head.bias,
        entropy_weight=torch.rand(2, 9),
        logprob_weight=torch.rand(2, 9),
        chunk_tokens=5,
        accumulate_into=into,
        group=share.group,
        impl=impl,
    )
    result.loss.backward()
    same = {"loss": result.loss.detach(), "d hidden": head.hidden.grad}
    return same, {"d bias": (head.bias.grad, 0), "d weight": (into, 0)}


def linear_with_lora(share, impl):
    head, target = draw_head(share)
    a, b = torch.randn(2, 8).requires_grad_(), share.part(torch.randn(VOCAB, 2), 0)
    common = dict(bias=head.bias, lora=(a, b, 0.5), group=share.group, impl=impl, chunk_tokens=4)
    stats = linear_softmax_stats(head.hidden, head.weight, target, **common)
    result = linear_token_loss(
        head.hidden, head.weight, target, entropy_weight=torch.rand(2, 9), **common
    )
    values = {"logprob": stats.logprob, "entropy": stats.entropy, "loss": result.loss}
    upstream = {**draw_upstream(2, 9), "loss": torch.tensor(2.0)}
    parts = {"weight": (head.weight, 0), "bias": (head.bias, 0), "b": (b, 0)}
    return with_gradients(values, upstream, parts, {"hidden": head.hidden, "a": a})


def deferred_linear_loss(frozen=(), **options):
    """As on a GPU: 5 rows of 16-bit gradient, and float32 logits of 2 of them at a time."""
    loss = linear_loss_of(torch.bfloat16, frozen, chunk_tokens=5, **options)

    def case(share, impl):
        with pytest.MonkeyPatch.context() as patch:
            products = play_gpu(patch)
            defer_small_chunks(patch)
            results = loss(share, impl)
        # The CPU's kernels cannot narrow; whole rows have no trips of dW to save if it is frozen.
        if impl != "cpu" and (share.group is not None or not frozen):
            assert {len(product.out) for product in products if product.b.shape[0] == 8} == {1, 2}
        return results

    return case


def entropy_loss_by(reduction):
    def case(share, impl):
        logits, _, _ = draw_rows()
        head, _ = draw_head(share)
        x, mask = share.part(logits), torch.rand(2, 9) > 0.4
        options = dict(reduction=reduction, temperature=0.5, group=share.group, impl=impl)
        values = {
            "loss": entropy_loss(x, mask, **options),
            "linear": linear_entropy_loss(
                head.hidden, head.weight, mask, bias=head.bias, **options
            ),
        }
        parts = {"logits": (x, -1), "weight": (head.weight, 0), "bias": (head.bias, 0)}
        upstream = {"loss": torch.tensor(1.0), "linear": torch.tensor(1.0)}
        return with_gradients(values, upstream, parts, {"hidden": head.hidden})

    return case


def covariance_over_the_vocabulary(share, impl):
    head, target = draw_head(share)
    target[0, 0] = -100
    cov = linear_token_covariance(
        head.hidden, head.weight, target, torch.randn(2, 9), vocab_group=share.group, impl=impl
    )
    return {"cov": cov}, {}


def covariance_over_both(share, impl):
    """The same group for the tokens, here every rank's own copy of them, and the vocabulary."""
    head, target = draw_head(share)
    advantage = torch.randn(2, 9)
    cov = linear_token_covariance(
        head.hidden,
        head.weight,
        target,
        advantage,
        group=share.group,
        vocab_group=share.group,
        impl=impl,
    )
    logprob = linear_softmax_stats(
        head.hidden, head.weight, target, group=share.group, impl=impl
    ).logprob
    return {"cov": cov, "again": token_covariance(logprob, advantage)}, {}


def compiled(share, impl):
    head, target = draw_head(share)
    rows = torch.rand(2, 9)

    def function(hidden, weight, bias):
        stats = linear_softmax_stats(
            hidden, weight, target, bias=bias, group=share.group, impl=impl
        )
        loss = linear_token_loss(hidden, weight, entropy_weight=rows, group=share.group, impl=impl)
        return stats.logprob * stats.entropy + loss.loss

    if share.group is not None:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    values = {"value": function(*head)}
    return head_gradients(values, {"value": torch.ones(2, 9)}, head)


CASES = {
    "stats, float32": stats_of(torch.float32),
    "stats, float64": stats_of(torch.float64),
    "stats, bfloat16": stats_of(torch.bfloat16),
    "stats, every argument": stats_with_everything,
    "stats, no target": stats_without_target,
    "stats, a view": stats_of_a_view,
    "stats, ids": stats_of_ids,
    "linear loss, ids": linear_loss_of_ids,
    "the likeliest": likeliest,
    "stats, sure rows": stats_of_sure_rows,
    "stats, shifted rows": stats_of_shifted_rows,
    "stats, bad rows": stats_of_bad_rows,
    "stats, any size": stats_of_rows_of_any_size,
    "stats, a shard of padding": stats_with_a_shard_of_padding,
    "stats, kept, a shard of nothing": kept_with_a_shard_of_nothing,
    "no rows": no_rows,
    "all rows masked": all_rows_masked,
    "stats, top_k": stats_of_what_was_kept(top_k=4),
    "stats, top_k, in pieces": stats_in_pieces_of_rows,
    "stats, all limits": stats_of_what_was_kept(top_k=20, top_p=0.8, min_p=0.01),
    "stats, vLLM's order, ties": stats_of_what_was_kept(
        torch.bfloat16, top_p=0.9, min_p=0.02, sampler="vllm"
    ),
    "stats, kept sets": stats_of_what_was_kept(),
    "linear stats, top_k, chunks of 4": linear_stats_of(torch.float32, chunk_tokens=4, top_k=15),
    "linear stats, top_k, blocks": linear_stats_in_blocks(torch.float32, chunk_tokens=7, top_k=15),
    "linear loss, top_k": linear_loss_of(torch.float32, chunk_tokens=3, top_k=5),
    "linear stats, one chunk": linear_stats_of(torch.float32),
    "linear stats, chunks of 4": linear_stats_of(torch.float32, chunk_tokens=4),
    "linear stats, frozen head": linear_stats_of_a_frozen_head,
    "linear stats, blocks": linear_stats_in_blocks(torch.float32, chunk_tokens=7),
    "linear stats, blocks of bfloat16": linear_stats_in_blocks(torch.bfloat16, chunk_tokens=7),
    "linear stats, float64": linear_stats_of(torch.float64, chunk_tokens=5),
    "linear stats, bfloat16": linear_stats_of(torch.bfloat16, logits_dtype=torch.float32),
    "linear stats, bias of -inf": linear_with_a_bias_of_minus_inf,
    "verl's head": verl_head,
    "loss": loss_case(inplace=False),
    "loss in place": loss_case(inplace=True),
    "linear loss": linear_loss_of(torch.float32),
    "linear loss, chunks of 3": linear_loss_of(torch.float32, chunk_tokens=3),
    "linear loss, valid_vocab": linear_loss_of(torch.float32, chunk_tokens=3, valid_vocab=28),
    "linear loss, bfloat16": linear_loss_of(torch.bfloat16, chunk_tokens=5, valid_vocab=28),
    "linear loss, deferred": deferred_linear_loss(),
    "linear loss, deferred, valid_vocab": deferred_linear_loss(valid_vocab=28),
    "linear loss, deferred, frozen weight": deferred_linear_loss(("weight",)),
    "linear loss, frozen weight": linear_loss_of(torch.float32, ("weight",)),
    "linear loss, frozen hidden": linear_loss_of(torch.float32, ("hidden",)),
    "linear, lora": linear_with_lora,
    "linear loss, a bfloat16 head, into float32": linear_loss_into,
    "linear loss, frozen": linear_loss_of(torch.float32, ("hidden", "weight", "bias")),
    "entropy loss, token_mean": entropy_loss_by("token_mean"),
    "entropy loss, sequence_mean": entropy_loss_by("sequence_mean"),
    "entropy loss, sum": entropy_loss_by("sum"),
    "entropy loss, float": entropy_loss_by(7.5),
    "covariance": covariance_over_the_vocabulary,
    "covariance, both groups": covariance_over_both,
    "compiled": compiled,
}

# Cuts other than SIZES, with a rank of one entry and with a rank of none.
OTHER_SIZES = {2: ((1, 62), (0, 63)), 3: ((7, 1, 55), (31, 0, 32))}
