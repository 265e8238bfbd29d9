"""A row cut between processes: each computes the loss of its own tokens, and no more than that.

    torchrun --nproc-per-node 2 examples/context_parallel.py

Three packed sequences count the same, however long they are. Of 2 W chunks of the row rank r holds
r and 2 W - 1 - r ("zigzag"), which evens out the work of causal attention; a layer without any
stands for the backbone here. Loss and gradients, summed over ranks, are those of one process.
"""

import torch
import torch.distributed as dist

from em_kernels import linear_token_loss, next_token_targets, segment_ids_from_cu_seqlens
from em_kernels.objectives import aggregation_weight

TOKENS, WIDTH, VOCAB = 48, 16, 50
CU_SEQLENS = torch.tensor([0, 20, 25, 46])  # two tokens of padding follow


def loss_of(weights, ids, segments, group=None):
    """This rank's part: -log p of its tokens' successors and 0.01 H, a mean over sequences."""
    embedding, layer, head = weights
    hidden = torch.tanh(embedding[ids] @ layer)
    layout = "contiguous" if group is None else "zigzag"
    target = next_token_targets(ids, segments, context_group=group, layout=layout)
    over = dict(mode="sequence_mean", segment_ids=segments, token_group=group)
    share = aggregation_weight(target != -100, **over)
    token_weights = dict(logprob_weight=-share, entropy_weight=0.01 * share)
    return linear_token_loss(hidden, head, target, **token_weights).loss


def main() -> tuple[float, float]:
    """(loss, relative error of the gradients), as this process sees them."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    shapes = (VOCAB, WIDTH), (WIDTH, WIDTH), (VOCAB, WIDTH)
    weights = [(torch.randn(shape) / 4).requires_grad_() for shape in shapes]
    row = torch.randint(VOCAB, (TOKENS,)), segment_ids_from_cu_seqlens(CU_SEQLENS, TOKENS)
    own = [torch.cat([x.chunk(2 * world)[i] for i in (rank, 2 * world - 1 - rank)]) for x in row]
    part = loss_of(weights, *own, dist.group.WORLD)
    summed = [part.detach(), *torch.autograd.grad(part, weights)]  # DDP: of world * part
    for x in summed:
        dist.all_reduce(x)
    whole = loss_of(weights, *row)  # what one process would have got
    expected = [whole.detach(), *torch.autograd.grad(whole, weights)]
    error = max(((s - e).norm() / e.norm()).item() for s, e in zip(summed, expected))
    print(f"rank {rank}: {len(own[0])} of {TOKENS} tokens, loss {summed[0]:.6f}, error {error:.1e}")
    dist.destroy_process_group()
    return summed[0].item(), error


if __name__ == "__main__":
    main()
