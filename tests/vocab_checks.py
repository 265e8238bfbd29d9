"""What a rank sees of a vocabulary-parallel call besides its results: errors, costs, DTensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from helpers import ON_CPU, product_flops
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from vocab_cases import OTHER_SIZES
from vocab_shares import VOCAB, WHOLE, Share, draw_head, draw_rows, own_share

from em_kernels import (
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_loss,
    softmax_stats,
    token_covariance,
    token_loss,
)
from em_kernels.backends.interface import RowSpec, Upstream
from em_kernels.linear import chunking, chunks


def message(call) -> str:
    """The error of `call`, type and text."""
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def called_differently():
    """Every rank is told, and none waits."""
    share = own_share()
    logits, target, _ = draw_rows()
    x, first = share.part(logits), share.rank == 0
    mask, other = torch.ones(2, 9), target.clone()
    mask[1, 1] = not first
    other[0, 0] += first
    hidden, weight = torch.ones(2, 9, 8), share.part(torch.ones(VOCAB, 8), 0)

    def stats(target=None, **kwargs):
        return message(lambda: softmax_stats(x, target, group=share.group, **kwargs))

    return {
        "mask": stats(mask=mask),
        "target": stats(other),
        "tokens": message(lambda: softmax_stats(x[: 1 + first], group=share.group)),
        "outputs": stats(outputs=("lse",) if first else ("entropy",)),
        "impl": stats(impl=ON_CPU[0 if first else -1]),
        "dtype": message(lambda: softmax_stats(x.double() if first else x, group=share.group)),
        "temperature": stats(temperature=0.5 if first else 0.7),
        "temperatures": stats(temperature=torch.full((2, 9), 0.5 if first else 0.7)),
        "top_p": stats(top_p=0.5 if first else 0.7),
        "kept": stats(kept=(torch.arange(18) + int(first), torch.arange(19))),
        "chunk": message(
            lambda: linear_softmax_stats(hidden, weight, chunk_tokens=4 + first, group=share.group)
        ),
        "frozen": message(
            lambda: linear_entropy_loss(hidden.requires_grad_(first), weight, group=share.group)
        ),
        "frozen weight": message(
            lambda: linear_entropy_loss(
                hidden.detach(), weight.detach().requires_grad_(first), group=share.group
            )
        ),
        "valid_vocab": stats(valid_vocab=VOCAB + 1),
        "out of range": stats(target + 1),
        "none at all": message(lambda: softmax_stats(torch.ones(3, 0), group=share.group)),
        "still in step": stats(target),
    }


def groups_that_are_none():
    """A subgroup serves its ranks; the rank outside is told."""
    members = (0, dist.get_world_size() - 1)
    group = dist.new_group(members)
    logits, target, _ = draw_rows()
    share = Share(group, int(dist.get_rank() != 0), (20, 43))
    x = share.part(logits)
    inside = dist.get_rank() in members
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    call = lambda: softmax_stats(x, target, group=group)  # noqa: E731
    return {
        "entropy": call().entropy.detach() if inside else message(call),
        "alone": softmax_stats(logits, target, group=alone).entropy,
        "text": message(lambda: softmax_stats(x, group="WORLD")),
        "covariance": message(lambda: token_covariance(x[..., 0], x[..., 0], group=0)),
        "weights": message(lambda: linear_entropy_loss(x, x[0], group=object())),
    }


def costs():
    """(collectives, floating-point operations of the products, those of one product) of a call."""
    head, target = draw_head(own_share())
    options = dict(group=dist.group.WORLD, chunk_tokens=6)
    weight = head.weight
    rows = torch.ones(2, 9)

    def loss(frozen_hidden=False, frozen_weight=False):
        hidden = head.hidden.detach().requires_grad_(not frozen_hidden)
        w = weight.detach().requires_grad_(not frozen_weight)
        linear_token_loss(hidden, w, target, entropy_weight=rows, **options).loss.backward()

    def stats():
        linear_softmax_stats(head.hidden, weight, target, **options).entropy.sum().backward()

    calls = {
        "loss": loss,
        "frozen weight": lambda: loss(frozen_weight=True),
        "frozen hidden": lambda: loss(frozen_hidden=True),
        "stats": stats,
        "from logits": lambda: softmax_stats(weight.T, group=dist.group.WORLD),
    }
    product = 2 * 18 * weight.numel()
    return {
        name: (*count_collectives(call), product_flops(call) / product)
        for name, call in calls.items()
    }


def count_collectives(call) -> tuple[int, int]:
    """How often `call` gathers and how often it reduces."""
    counts, originals = {"all_gather": 0, "all_reduce": 0}, {}

    def counting(name):
        def collective(*args, **kwargs):
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return collective

    for name in counts:
        originals[name] = getattr(dist, name)
        setattr(dist, name, counting(name))
    try:
        call()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts["all_gather"], counts["all_reduce"]


def uneven_chunks():
    """Collectives of a call whose smallest shard would fit in one chunk, the largest in two."""
    sizes = OTHER_SIZES[dist.get_world_size()][0]
    head, _ = draw_head(own_share(sizes))
    budget, chunking.CPU_WORKSPACE_BYTES = chunking.CPU_WORKSPACE_BYTES, 16 * max(sizes) * 4
    try:
        return count_collectives(
            lambda: linear_softmax_stats(head.hidden, head.weight, group=dist.group.WORLD)
        )
    finally:
        chunking.CPU_WORKSPACE_BYTES = budget


def frozen_chunks():
    """Collectives of a bfloat16 loss by how many ranks need dW: where none does, the rows are two
    chunks, and else one, in the memory of a float32 dW."""
    share = own_share()
    head, _ = draw_head(share, torch.bfloat16)
    width = chunking.row_stride(max(share.sizes))
    budget, chunking.CPU_WORKSPACE_BYTES = chunking.CPU_WORKSPACE_BYTES, 16 * width * 2

    def count(trained):
        weight = head.weight.detach().requires_grad_(share.rank < trained)
        return count_collectives(
            lambda: linear_entropy_loss(head.hidden, weight, group=share.group).backward()
        )

    try:
        return [count(trained) for trained in (0, 1, dist.get_world_size())]
    finally:
        chunking.CPU_WORKSPACE_BYTES = budget


def opcheck():
    """Operators with a group, in step on all ranks."""
    head, target = draw_head(own_share())
    name = dist.group.WORLD.group_name
    gradient = (torch.ones(3, 2).T.bfloat16(), name)
    of_rows = RowSpec(head.bias.detach(), target.view(-1), group=name)
    torch.library.opcheck(torch.ops.em_kernels.all_reduce.default, gradient)
    torch.library.opcheck(
        torch.ops.em_kernels.linear_loss.default,
        (
            head.hidden.detach().view(18, 8),
            head.weight.detach(),
            *of_rows[: RowSpec._fields.index("truncation")],
            *Upstream(entropy=torch.ones(18)),
            *chunks.Needs(True, True, True),
            ("entropy",),
            7,
            None,
            "reference",
        ),
    )
    return "passed"


def dtensors():
    """Losses and gradients by what holds the weight, and errors."""

    head, target = draw_head(WHOLE)
    weight, bias, hidden = (x.detach() for x in (head.weight, head.bias, head.hidden))
    world = (dist.get_world_size(),)
    tensor_parallel = init_device_mesh("cpu", world, mesh_dim_names=("tp",))
    data_parallel = init_device_mesh("cpu", world, mesh_dim_names=("dp",))
    rows = torch.linspace(0, 1, 18).view(2, 9)

    def loss(mesh, placement, group=None, bias_placement=None, hidden=hidden):
        w = distribute_tensor(weight, mesh, [placement]).requires_grad_()
        b = distribute_tensor(bias, mesh, [bias_placement or placement]).requires_grad_()
        x = hidden.detach().requires_grad_()
        result = linear_token_loss(
            x, w, target, bias=b, entropy_weight=rows, logprob_weight=rows, group=group
        )
        result.loss.backward()
        assert w.grad.placements == w.placements and b.grad.placements == b.placements
        return [result.loss.detach(), w.grad.full_tensor(), b.grad.full_tensor()], x.grad

    def accumulated(mesh, whole=False):
        w = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
        into = distribute_tensor(torch.zeros_like(weight), mesh, [Shard(0)])
        given = torch.zeros_like(weight) if whole else into
        options = dict(entropy_weight=rows, logprob_weight=rows, accumulate_into=given)
        b = distribute_tensor(bias, mesh, [Shard(0)])
        linear_token_loss(hidden, w, target, bias=b, **options).loss.backward()
        assert w.grad is None
        return into.full_tensor()

    def logits(placement, group=None):
        x = distribute_tensor(hidden @ weight.T, tensor_parallel, [placement]).requires_grad_()
        stats = softmax_stats(x, target, group=group)
        (grad,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), x)
        assert grad.placements == x.placements
        return [stats.logprob.detach(), stats.entropy.detach(), grad.full_tensor()]

    def token_losses(placement):
        x = distribute_tensor(hidden @ weight.T, tensor_parallel, [placement]).requires_grad_()
        loss = token_loss(x, target, entropy_weight=rows).loss
        return [loss.detach(), torch.autograd.grad(loss, x)[0].full_tensor()]

    def sequence_parallel():
        x = distribute_tensor(hidden, tensor_parallel, [Shard(1)]).requires_grad_()
        linear = torch.nn.Linear(8, VOCAB)
        linear.weight, linear.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        parallelize_module(linear, tensor_parallel, ColwiseParallel())
        loss = linear_entropy_loss(x, linear.weight, bias=linear.bias)
        (grad,) = torch.autograd.grad(loss, x)
        return [loss.detach(), grad.full_tensor()]

    def fully_sharded():
        linear = torch.nn.Linear(8, VOCAB)
        linear.weight, linear.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        fully_shard(linear)
        result = linear_token_loss(
            own, linear.weight, target, bias=linear.bias, entropy_weight=rows, logprob_weight=rows
        )
        result.loss.backward()
        return [linear.weight.grad.full_tensor(), linear.bias.grad.full_tensor()]

    own = hidden * (1 + dist.get_rank())  # other tokens on every data-parallel rank
    return {
        "tensor parallel": loss(tensor_parallel, Shard(0)),
        "accumulated": accumulated(tensor_parallel),
        "accumulated, gathered": message(lambda: accumulated(data_parallel, whole=True)),
        "group given": loss(data_parallel, Shard(0), group=data_parallel.get_group()),
        "replicated": loss(tensor_parallel, Replicate()),
        "data parallel": loss(data_parallel, Shard(0), hidden=own),
        "collectives": count_collectives(lambda: loss(tensor_parallel, Shard(0)))[0],
        "gathered": count_collectives(lambda: loss(data_parallel, Shard(0)))[0],
        "sequence parallel": sequence_parallel(),
        "fully_shard": fully_sharded(),
        "logits": logits(Shard(2)),
        "logits, group given": logits(Shard(2), tensor_parallel.get_group()),
        "logits, replicated": logits(Replicate()),
        "loss of logits": token_losses(Shard(2)),
        "logits cut elsewhere": message(lambda: logits(Shard(1))),
        "other bias": message(lambda: loss(tensor_parallel, Shard(0), None, Replicate())),
        "other group": message(
            lambda: loss(tensor_parallel, Replicate(), tensor_parallel.get_group())
        ),
    }


CHECKS = {
    "called differently": called_differently,
    "groups that are none": groups_that_are_none,
    "costs": costs,
    "uneven chunks": uneven_chunks,
    "frozen chunks": frozen_chunks,
    "opcheck": opcheck,
    "dtensors": dtensors,
}
