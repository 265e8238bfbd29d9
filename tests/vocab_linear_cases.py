"""The calls of `vocab_cases` that take hidden states and a head, alone or beside logits."""

from __future__ import annotations

import pytest
import torch
from gpu_products import block_small_vocabularies, defer_small_chunks, play_gpu
from vocab_shares import (
    INF,
    OF_IDS,
    VOCAB,
    draw_head,
    draw_rows,
    draw_upstream,
    head_gradients,
    ids_of,
    with_gradients,
)

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_covariance,
    linear_token_loss,
    linear_top_logprobs,
    softmax_stats,
    token_covariance,
    top_logprobs,
)
from em_kernels.backends.interface import OUTPUTS
from em_kernels.integrations import verl
from em_kernels.linear import vocab_blocks
from em_kernels.ops.checks import check_group
from em_kernels.ops.sources import copy_to_ranks


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


def linear_loss_of(dtype, frozen=(), but_first=False, **options):
    """`but_first`: the first rank of a group has nothing frozen."""

    def case(share, impl):
        head, target = draw_head(share, dtype)
        target %= options.get("valid_vocab", VOCAB)
        for name in frozen:
            trains = but_first and share.group is not None and share.rank == 0
            getattr(head, name).requires_grad_(trains)
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
    loss = linear_loss_of(torch.bfloat16, frozen, True, chunk_tokens=5, **options)

    def case(share, impl):
        with pytest.MonkeyPatch.context() as patch:
            products = play_gpu(patch)
            defer_small_chunks(patch)
            results = loss(share, impl)
        # There are no trips of dW to save where no rank needs it.
        if share.group is not None or not frozen:
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
    "linear loss, ids": linear_loss_of_ids,
    "the likeliest": likeliest,
    "no rows": no_rows,
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
    "linear loss": linear_loss_of(torch.float32),
    "linear loss, chunks of 3": linear_loss_of(torch.float32, chunk_tokens=3),
    "linear loss, valid_vocab": linear_loss_of(torch.float32, chunk_tokens=3, valid_vocab=28),
    "linear loss, bfloat16": linear_loss_of(torch.bfloat16, chunk_tokens=5, valid_vocab=28),
    "linear loss, deferred": deferred_linear_loss(),
    "linear loss, deferred, valid_vocab": deferred_linear_loss(valid_vocab=28),
    "linear loss, deferred, weight frozen on all ranks but one": deferred_linear_loss(("weight",)),
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
