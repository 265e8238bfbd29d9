"""Sampling shared among ranks: each draws its rows, and together what one process would draw.

A token is drawn as argmax_v p_v / e_v with e_v ~ Exp(1), which is how torch.multinomial draws one.
Every rank draws e for all rows of the batch from the same random state and uses its own rows of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from em_kernels.lm.ranks import Ranks


class SharedDraw:
    """A logits processor that makes the likeliest token of `rows` the one that is drawn.

    It comes last: `warpers` are the processors of temperature, top_k and top_p.
    """

    def __init__(self, warpers: Callable, rows: Tensor, batch: int, vocabulary: int):
        self.warpers, self.rows, self.shape = warpers, rows, (batch, vocabulary)
        self.draws = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = self.warpers(input_ids, scores).softmax(-1)
        return probabilities / self._noise(scores.device)[self.rows]

    def catch_up(self, draws: int, device: torch.device) -> None:
        """Draw as often as the rank whose answers were the longest."""
        while self.draws < draws:
            self._noise(device)

    def _noise(self, device: torch.device) -> Tensor:
        self.draws += 1
        return torch.empty(self.shape, device=device).exponential_()


def generate_share(
    ranks: Ranks,
    generate: Callable[[Tensor, SharedDraw], Tensor],
    warpers: Callable,
    batch: int,
    vocabulary: int,
    filler: int,
) -> Tensor:
    """The answers (batch, longest) of all ranks; `generate` draws those of some rows."""
    rows = torch.arange(batch).tensor_split(ranks.size)[ranks.rank]
    draw = SharedDraw(warpers, rows, batch, vocabulary)

    def own() -> tuple[Tensor, int]:
        answers = generate(rows, draw) if len(rows) else torch.zeros(0, 0, dtype=torch.long)
        return answers.cpu(), draw.draws

    shares = ranks.gather(own)
    draw.catch_up(max(draws for _, draws in shares), ranks.device)
    width = max(answers.shape[1] for answers, _ in shares)
    rows = [pad(answers, (0, width - answers.shape[1]), value=filler) for answers, _ in shares]
    return torch.cat(rows).to(ranks.device)
