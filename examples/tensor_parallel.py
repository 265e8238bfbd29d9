"""A head whose vocabulary is cut between processes: entropy minimisation without its logits.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Each process holds some rows of the head. Every one gets the statistics of whole rows, the same bits
on each, and the gradient of its own rows; hidden states get theirs summed over all of them.
"""

import os

import torch
import torch.distributed as dist

import em_kernels

TOKENS, WIDTH, VOCAB = 64, 32, 1000


def main() -> tuple[float, float]:
    """(loss, relative error of the gradients), as this process sees them."""
    gpus = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])  # one for each process
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    torch.manual_seed(0)  # the same everywhere; a real model loads its own rows only
    hidden = torch.randn(TOKENS, WIDTH).to(device).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH).to(device)
    own = weight.tensor_split(world)[rank].clone().requires_grad_()

    loss = em_kernels.linear_entropy_loss(hidden, own, group=dist.group.WORLD)
    grads = torch.autograd.grad(loss, (hidden, own))

    # What one process with the whole head would have got.
    whole = weight.clone().requires_grad_()
    expected = em_kernels.linear_entropy_loss(hidden, whole)
    hidden_grad, weight_grad = torch.autograd.grad(expected, (hidden, whole))
    pairs = zip(grads, (hidden_grad, weight_grad.tensor_split(world)[rank]))
    error = max(((g - e).norm() / e.norm()).item() for g, e in pairs)
    print(f"rank {rank}: {len(own)} of {VOCAB} rows, H {loss.item():.6f} nats, error {error:.1e}")
    dist.destroy_process_group()
    return loss.item(), error


if __name__ == "__main__":
    main()
