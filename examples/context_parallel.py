"""A row cut between processes: each computes the loss of its own tokens, and no more than that.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Three packed sequences in one row, each counting the same however long it is. Of 2 W chunks of the
row rank r holds r and 2 W - 1 - r ("zigzag"), which evens out the work of causal attention; keys
and values are gathered. Loss and gradients, summed over ranks, are those of one process.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from em_kernels import linear_token_loss, next_token_targets, segment_ids_from_cu_seqlens
from em_kernels.objectives import aggregation_weight

TOKENS, WIDTH, VOCAB = 48, 16, 50
CU_SEQLENS = torch.tensor([0, 20, 25, 46])  # two tokens of padding follow


class Model(nn.Module):
    """One layer of causal attention, within sequences."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def hidden(self, ids: Tensor, places: Tensor, segments: Tensor, group) -> Tensor:
        x = self.embedding(ids)
        q, k, v = self.to_qkv(x).chunk(3, -1)
        k, v, all_places, all_segments = (gather(t, group) for t in (k, v, places, segments))
        earlier = all_places <= places[:, None]
        seen = earlier & (all_segments == segments[:, None])
        return x + (q @ k.T).masked_fill(~seen, -torch.inf).softmax(-1) @ v


class Gather(torch.autograd.Function):
    """The parts of all ranks; each gets back the sum of the gradients of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None


def gather(x: Tensor, group) -> Tensor:
    return x if group is None else Gather.apply(x, group)


def loss_of(model: Model, ids: Tensor, places: Tensor, segments: Tensor, group=None) -> Tensor:
    """This rank's part: -log p of its tokens' successors and 0.01 H, a mean over sequences."""
    layout = "contiguous" if group is None else "zigzag"
    target = next_token_targets(ids, segments, context_group=group, layout=layout)
    share = aggregation_weight(
        target != -100, mode="sequence_mean", segment_ids=segments, token_group=group
    )
    hidden = model.hidden(ids, places, segments, group)
    weights = dict(logprob_weight=-share, entropy_weight=0.01 * share)
    return linear_token_loss(hidden, model.head.weight, target, **weights).loss


def main() -> tuple[float, float]:
    """(loss, relative error of the gradients), as this process sees them."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, ids = Model(), torch.randint(VOCAB, (TOKENS,))
    row = ids, torch.arange(TOKENS), segment_ids_from_cu_seqlens(CU_SEQLENS, TOKENS)
    chunks = [x.chunk(2 * world) for x in row]
    own = [torch.cat([c[rank], c[2 * world - 1 - rank]]) for c in chunks]

    part = loss_of(model, *own, dist.group.WORLD)
    grads = torch.autograd.grad(part, list(model.parameters()))  # DDP: of world * part
    summed = [part.detach(), *grads]
    for x in summed:
        dist.all_reduce(x)

    whole = loss_of(model, *row)  # what one process would have got
    expected = [whole.detach(), *torch.autograd.grad(whole, list(model.parameters()))]
    error = max(((s - e).norm() / e.norm()).item() for s, e in zip(summed, expected))
    print(f"rank {rank}: {len(own[0])} of {TOKENS} tokens, loss {summed[0]:.6f}, error {error:.1e}")
    dist.destroy_process_group()
    return summed[0].item(), error


if __name__ == "__main__":
    main()
