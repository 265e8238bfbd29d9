"""How a model is trained: by one process, or sharded over the ranks (FSDP2).

The loop is the same for both. Every rank knows all the answers of an update and works on its share
of the micro-batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from em_kernels.lm.heads import causal_lm, read_head
from em_kernels.lm.modes import Modes
from em_kernels.lm.pieces import decoder_layers
from em_kernels.lm.ranks import Ranks


def make_strategy(
    model, temperature: float, dtype: str, ranks: Ranks
) -> SingleProcessStrategy | FSDPStrategy:
    """Make the model ready to be trained by these ranks."""
    if ranks.size == 1:
        return SingleProcessStrategy(model, temperature, dtype)
    return FSDPStrategy(model, temperature, dtype, ranks)


class LossModule(nn.Module):
    """A function of (model, head, part, temperature) as a module's forward, where FSDP2 has the
    head's weight gathered.

    The head is read at every call: its parameter is another object while it is gathered.
    """

    def __init__(self, model, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, part, compute: Callable) -> Any:
        return compute(self.model, read_head(self.model), part, self.temperature)


class TrainMode:
    """Train mode, as the user set it: modules in eval mode below a model in train mode stay so.

    A model in eval mode (from_pretrained) is trained with all its modules in train mode. It counts
    by itself where it is in a PEFT model, which is in train mode around any.
    """

    def __init__(self, model):
        self._modes = Modes(model) if causal_lm(model).training else None

    def __call__(self, model: nn.Module) -> None:
        model.train()
        if self._modes:
            self._modes.restore(model)


class SingleProcessStrategy:
    """A model trained by one process; bfloat16 is autocast."""

    def __init__(self, model, temperature: float, dtype: str):
        self.model, self.bfloat16 = model, dtype == "bfloat16"
        self.trained, self.module = model, LossModule(model, temperature)
        self._train_mode = TrainMode(model)

    def compute(self, part, compute: Callable) -> Any:
        """compute(model, head, part, temperature)."""
        with self._autocast():
            return self.module(part, compute)

    def train(self) -> None:
        self._train_mode(self.trained)

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        with self._autocast():
            yield self.model

    @contextmanager
    def full_model_on_first(self, device: str | None = None) -> Iterator[nn.Module]:
        yield self.model

    def clip_gradient(self, parameters: list[nn.Parameter], largest: float) -> float:
        """Scale the gradient to a norm of at most `largest`; returns the norm before."""
        found = [p.grad for p in parameters if p.grad is not None]
        if all(gradient.dtype.itemsize > 2 for gradient in found):
            return float(nn.utils.clip_grad_norm_(parameters, largest))
        norm = _norm(found)
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return float(norm)

    def finish(self) -> None:
        """Nothing: the model is what was trained."""

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16)


def _norm(tensors: list[Tensor]) -> Tensor:
    """Of all together, in float32: torch's is in their own dtype."""
    pieces = (piece for x in tensors for piece in x.flatten().split(1 << 22))
    return torch.stack([torch.linalg.vector_norm(x, dtype=torch.float32) for x in pieces]).norm()


class FSDPStrategy:
    """A model trained by several: `trained` holds a shard of every parameter, `model` is whole.

    `trained` is a copy under FSDP2, by decoder layer; it computes the loss and nothing else.
    `model` has no weights, but for the time that `full_model` and its kin gather them into it: so
    generating, evaluating and saving are those of one process, and no rank waits for another.
    With bfloat16 the gathered parameters are bfloat16, the shards, gradients and their sum over
    ranks float32. Gradients are summed over the ranks, not averaged.
    """

    def __init__(self, model, temperature: float, dtype: str, ranks: Ranks):
        self.model, self.ranks = model, ranks
        self.compute_dtype = torch.bfloat16 if dtype == "bfloat16" else None
        parameters = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
        self.trained = copy.deepcopy(model, parameters)
        self.module: Any = LossModule(self.trained, temperature)
        self._train_mode = TrainMode(model)
        _fully_shard(self.module, self.compute_dtype, ranks)
        self._release()
        model.to(ranks.device)

    def compute(self, part, compute: Callable) -> Any:
        result = self.module(part, compute)
        if not torch.is_grad_enabled():  # no backward pass will
            self.module.reshard()
        return result

    def train(self) -> None:
        self._train_mode(self.trained)

    @contextmanager
    def full_model(self) -> Iterator[nn.Module]:
        """The whole model on every rank, in the dtype that it computes in."""
        self._fill(dtype=self.compute_dtype)
        try:
            yield self.model
        finally:
            self._release()

    @contextmanager
    def full_model_on_first(self, device: str | None = None) -> Iterator[nn.Module]:
        """The whole model in its own dtype on rank 0 (on `device`); without weights elsewhere."""
        self._fill(device=device, everywhere=False)
        try:
            yield self.model
        finally:
            self._release()

    def clip_gradient(self, parameters: list[nn.Parameter], largest: float) -> float:
        """The same, of the norm over all shards."""
        norm: Any = nn.utils.clip_grad_norm_(parameters, largest)
        return float(norm.full_tensor())

    def finish(self) -> None:
        """Leave the trained weights in the model, on every rank."""
        self._fill()

    @torch.no_grad()
    def _fill(self, dtype=None, device: str | None = None, everywhere: bool = True) -> None:
        for whole, shard in zip(self.model.parameters(), self.trained.parameters(), strict=True):
            gathered = shard.full_tensor()
            if everywhere or self.ranks.is_first:
                whole.data = gathered.to(device=device, dtype=dtype)

    def _release(self) -> None:
        for parameter in self.model.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.ranks.device)


def _fully_shard(module: LossModule, compute_dtype: torch.dtype | None, ranks: Ranks) -> None:
    """Decoder layers one by one, then what is left: embeddings, last norm and head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(str(torch.device(ranks.device or "cpu").type), (ranks.size,))
    narrow = compute_dtype or any(p.dtype == torch.bfloat16 for p in module.parameters())
    reduce = torch.float32 if narrow else None
    for layer in decoder_layers(module.model):
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(compute_dtype, reduce))
    weights_stay_float32 = MixedPrecisionPolicy(compute_dtype, reduce, cast_forward_inputs=False)
    fully_shard(module, mesh=mesh, mp_policy=weights_stay_float32)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
