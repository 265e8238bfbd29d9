"""What an update does to the entropy, to first order, whatever its loss is.

Let every token t have logits z_t of its own (at the temperature of the loss), and let the loss L
of a step read statistics s_t of them: log-probabilities, entropies, divergences. A plain step of
rate r on L then changes the token's entropy by

    dH_t = -r <dH_t/dz_t, dL/dz_t> = -r sum_s dL/ds_t <dH_t/dz_t, ds_t/dz_t> + O(r^2).

dL/ds is autograd's, of the very loss that the optimiser steps on: clipped, selected, weighted,
with its penalties and its bonus. The slopes <dH/dz, ds/dz> are those of the current policy
(`entropy_slopes`). Weights that tokens share carry an entropy further: `EntropyGradient`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from em_kernels.backends.interface import TokenStats
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.offload import activations
from em_kernels.objectives.aggregation import aggregation_weight
from em_kernels.ops.dtensor import own_part
from em_kernels.trainer.batch import Tokens, micro_batches, token_loss
from em_kernels.trainer.entropy_slopes import Slopes
from em_kernels.trainer.losses import StepLoss
from em_kernels.trainer.run import Run

PREDICTED = "predicted_entropy_change"


def watched(stats: TokenStats, tokens: Tokens, slopes: Slopes) -> tuple[TokenStats, Tokens]:
    """The same, with places in the graph of the loss where `with_prediction` can read dL/ds."""
    own = {name: x for name, x in stats._asdict().items() if name in slopes and x is not None}
    others = {name: x for name, x in tokens._asdict().items() if name in slopes and x is not None}
    # Clones: at the results of its module FSDP2 waits for the one backward pass.
    return (
        stats._replace(**{name: x.clone() for name, x in own.items()}),
        tokens._replace(**{name: x.clone() for name, x in others.items()}),
    )


def with_prediction(found: StepLoss, stats: TokenStats, tokens: Tokens, slopes: Slopes) -> StepLoss:
    """The loss of a micro-batch with -sum_t sum_s dL/ds_t <dH_t/dz_t, ds_t/dz_t> among its sums:
    the change of the sum of the entropies for each unit of learning rate."""
    every: dict[str, Tensor | None] = {**tokens._asdict(), **stats._asdict()}
    named = {name: every[name] for name in slopes}
    read = {name: x for name, x in named.items() if x is not None and x.requires_grad}
    options: Any = dict(retain_graph=True, allow_unused=True)
    gradients = torch.autograd.grad(found.loss, list(read.values()), **options)
    change = 0.0
    for name, gradient in zip(read, gradients):
        if gradient is not None:
            change -= (gradient * slopes[name]).sum(dtype=torch.float64).item()
    return found._replace(sums={**found.sums, PREDICTED: change})


class EntropyGradient:
    """The gradient of the mean entropy of some tokens in the weights, and the weights as they are.

    `change()` is <gradient, weights now - weights then>: the change to first order in the weights,
    of whatever steps any optimiser has taken.
    """

    def __init__(self, run: Run, tokens: Tokens):
        self.run, self.parameters = run, run.optimizer.param_groups[0]["params"]
        weight = aggregation_weight(tokens.loss_mask).float()
        tokens, strategy = tokens._replace(entropy_weight=weight), run.strategy
        with eval_mode(strategy.trained):
            parts = micro_batches(tokens, run.config.micro_batch)
            for part in run.ranks.shard_micro_batches(parts):
                with activations(run.config.long, part.tokens.input_ids):
                    loss = strategy.compute(part.tokens, token_loss).loss
                loss.backward()
        self.gradients = [p.grad for p in self.parameters]
        self.before = [p.detach().clone() for p in self.parameters]
        run.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def change(self) -> float:
        total = 0.0
        for now, before, gradient in zip(self.parameters, self.before, self.gradients):
            if gradient is not None:
                product = own_part(gradient) * (own_part(now) - own_part(before))
                total += product.sum(dtype=torch.float64).item()
        return self.run.ranks.sum(total)[0]
