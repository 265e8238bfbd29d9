"""AdamW whose weights are bfloat16, or whose states take 2 bytes or 1 instead of 4.

A step of 2e-5 on a bfloat16 weight of 0.02, whose neighbours are 1.2e-4 away, is lost when it is
rounded to the nearest, every time. Rounded at random (see `rounding`) it is there on average, and
no float32 copy of the weights is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from em_kernels.lm.random_state import seed_of
from em_kernels.ops.dtensor import own_part
from em_kernels.trainer.rounding import BLOCK, read_codes, round_to, write_codes

OPTIMIZER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": torch.uint8}
LEAST = 4096  # values of a parameter from which on its states may be in 8 bits
PIECE = 4096 * BLOCK  # values that are in float32 at a time
BETAS, EPS = (0.9, 0.999), 1e-8
SIGNED = {"exp_avg": True, "exp_avg_sq": False}


def make_adamw(
    parameters: list[nn.Parameter], lr: float, weight_decay: float, states: str | None, seed: int
) -> torch.optim.Optimizer:
    """torch's AdamW where weights and states are float32 or wider, else `RoundingAdamW`."""
    narrow = any(p.dtype == torch.bfloat16 for p in parameters)
    if not narrow and states in (None, "float32"):
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return RoundingAdamW(parameters, lr, weight_decay, states=states, seed=seed)


class RoundingAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2), for narrow weights and states.

    Of a parameter w with gradient g, in float32, at its step t,

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  b1 = 0.9, b2 = 0.999,
        w = (1 - lr decay) w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + 1e-8).

    Whichever of w, m and v is kept in bfloat16 or 8 bits is rounded stochastically. The moments
    need it as the weights do: v changes by a thousandth a step, less than half the distance to the
    next bfloat16. The random numbers depend on `seed`, t and the parameter's place alone.

    In 8 bits m and sqrt(v) are codes of `dynamic_map` with a scale for every 256 values; parameters
    of fewer than 4096 values keep m and v in float32, as bitsandbytes has them. That the root is
    kept, which has half the range, and the stochastic rounding are this library's own.

    Args:
        parameters: float tensors or DTensors; with "8bit" no DTensors.
        states: "float32", "bfloat16" or "8bit"; None keeps m and v in the dtype of the parameter.
        seed: of the rounding.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float,
        *,
        states: str | None = None,
        seed: int = 0,
    ):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay))
        self.states, self.seed = states, seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._move(parameter, group, place)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            self._begin(parameter, state)
        state["step"] += 1
        step, grad = int(state["step"]), parameter.grad
        assert grad is not None
        weight, gradient = own_part(parameter), own_part(grad)
        held = {name: own_part(x) for name, x in state.items() if name != "step"}
        flat = {name: x.contiguous().view(-1) for name, x in held.items()}
        w, g = weight.contiguous().view(-1), gradient.contiguous().view(-1)
        generator = torch.Generator(w.device).manual_seed(seed_of(self.seed, step, place))
        for start in range(0, len(w), PIECE):
            piece = slice(start, start + PIECE)
            _step(w[piece], g[piece], _piece(flat, start), step, group, generator)
        for whole, moved in [(weight, w), *((held[name], flat[name]) for name in held)]:
            if whole.data_ptr() != moved.data_ptr():  # it was not contiguous
                whole.copy_(moved.view_as(whole))

    def _begin(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        state["step"] = torch.tensor(0.0)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        for name in SIGNED:
            dtype = parameter.dtype if self.states is None else OPTIMIZER_DTYPES[self.states]
            if dtype == torch.uint8 and parameter.numel() < LEAST:
                dtype = wide
            state[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            if dtype == torch.uint8:
                blocks = -(-parameter.numel() // BLOCK)
                state[f"{name}_scale"] = torch.zeros(blocks, device=parameter.device)


def _step(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    step: int,
    group: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Of a piece of a parameter, in place."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    g = gradient.to(wide)
    m, v = _read("exp_avg", state).to(wide), _read("exp_avg_sq", state).to(wide)
    m = torch.lerp(m, g, 1 - BETAS[0])
    v = (v * BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    scale = (v / (1 - BETAS[1] ** step)).sqrt_().add_(EPS)
    w = weight.to(wide) * (1 - group["lr"] * group["weight_decay"])
    w.addcdiv_(m, scale, value=-group["lr"] / (1 - BETAS[0] ** step))
    weight.copy_(round_to(w, weight.dtype, generator))
    _write("exp_avg", m, state, generator)
    _write("exp_avg_sq", v, state, generator)


def _piece(flat: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    """What belongs to the values from `start` on; of scales there is one a block."""
    found = {}
    for name, x in flat.items():
        size = BLOCK if name.endswith("_scale") else 1
        found[name] = x[start // size : (start + PIECE) // size]
    return found


def _read(name: str, state: dict[str, Tensor]) -> Tensor:
    if state[name].dtype != torch.uint8:
        return state[name]
    found = read_codes(state[name], state[f"{name}_scale"], SIGNED[name])
    return found if SIGNED[name] else found.square_()


def _write(name: str, x: Tensor, state: dict[str, Tensor], generator: torch.Generator) -> None:
    if state[name].dtype != torch.uint8:
        state[name].copy_(round_to(x, state[name].dtype, generator))
        return
    x = x.float() if SIGNED[name] else x.float().sqrt()
    write_codes(x, state[name], state[f"{name}_scale"], SIGNED[name], generator)
