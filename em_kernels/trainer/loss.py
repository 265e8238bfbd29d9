"""The loss of one micro-batch: hidden states of the backbone, then entropy and gradient of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from em_kernels.lm.heads import Head, read_head
from em_kernels.lm.models import hidden_states
from em_kernels.ops.token_loss import TokenLoss, linear_token_loss


class Batch(NamedTuple):
    """What the loss of one update is computed from; all (B, T), T columns of prompt and answer.

    `loss_mask` marks the positions with a weight; position t holds the distribution of token t + 1.
    The loss is sum_t entropy_weight_t H_t + logprob_weight_t log p(token t + 1).
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor | None
    loss_mask: Tensor
    entropy_weight: Tensor | None
    logprob_weight: Tensor | None

    def without_weight(self) -> Batch:
        """The same tokens, none of which counts: loss and gradient are zero."""
        weights = (self.entropy_weight, self.logprob_weight)
        zeros = [None if w is None else torch.zeros_like(w) for w in weights]
        return self._replace(
            loss_mask=torch.zeros_like(self.loss_mask),
            entropy_weight=zeros[0],
            logprob_weight=zeros[1],
        )


def micro_batch_loss(
    model,
    head: Head,
    part: Batch,
    temperature: float,
    outputs: tuple[str, ...] = ("entropy",),
) -> TokenLoss:
    """Loss, and detached statistics per position, without full logits."""
    hidden = hidden_states(model, part.input_ids, part.attention_mask, part.position_ids)
    return linear_token_loss(
        hidden,
        head.weight,
        part.input_ids.roll(-1, 1),
        entropy_weight=part.entropy_weight,
        logprob_weight=part.logprob_weight,
        outputs=outputs,
        temperature=temperature,
        mask=part.loss_mask,
        **head.arguments,
    )


class LossModule(nn.Module):
    """`micro_batch_loss`, or another function of (model, head, part, temperature), as a module's
    forward, where FSDP2 has the head's weight gathered.

    The head is read at every call: its parameter is another object while it is gathered.
    """

    def __init__(self, model, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, part, compute: Callable = micro_batch_loss):
        return compute(self.model, read_head(self.model), part, self.temperature)
