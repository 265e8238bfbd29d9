"""The calls of `vocab_cases` that take logits."""

from __future__ import annotations

from unittest.mock import patch

import torch
from contract.sizes import rows_of_any_size
from helpers import rows_of_entropy
from vocab_shares import (
    INF,
    NAN,
    OF_IDS,
    SIZES,
    VOCAB,
    draw_rows,
    draw_upstream,
    ids_of,
    with_gradients,
)

from em_kernels import softmax_stats, token_loss
from em_kernels.backends import support
from em_kernels.backends.interface import OUTPUTS


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


def all_rows_masked(share, impl):
    logits, target, upstream = draw_rows()
    return stats_case(share, logits, target, upstream, mask=torch.zeros(2, 9), impl=impl)


def stats_of_ids(share, impl):
    logits, target, upstream = draw_rows()
    upstream["logprob"] = torch.randn(2, 9, 5)
    return stats_case(share, logits, ids_of(target), upstream, OF_IDS, impl=impl, softcap=9.0)


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


CASES = {
    "stats, float32": stats_of(torch.float32),
    "stats, float64": stats_of(torch.float64),
    "stats, bfloat16": stats_of(torch.bfloat16),
    "stats, every argument": stats_with_everything,
    "stats, no target": stats_without_target,
    "stats, a view": stats_of_a_view,
    "stats, ids": stats_of_ids,
    "stats, sure rows": stats_of_sure_rows,
    "stats, shifted rows": stats_of_shifted_rows,
    "stats, bad rows": stats_of_bad_rows,
    "stats, any size": stats_of_rows_of_any_size,
    "stats, a shard of padding": stats_with_a_shard_of_padding,
    "stats, kept, a shard of nothing": kept_with_a_shard_of_nothing,
    "all rows masked": all_rows_masked,
    "stats, top_k": stats_of_what_was_kept(top_k=4),
    "stats, top_k, in pieces": stats_in_pieces_of_rows,
    "stats, all limits": stats_of_what_was_kept(top_k=20, top_p=0.8, min_p=0.01),
    "stats, vLLM's order, ties": stats_of_what_was_kept(
        torch.bfloat16, top_p=0.9, min_p=0.02, sampler="vllm"
    ),
    "stats, kept sets": stats_of_what_was_kept(),
    "loss": loss_case(inplace=False),
    "loss in place": loss_case(inplace=True),
}
