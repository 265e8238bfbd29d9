"""sum_v p_v^2 of every token for verl's optimal-token baseline, where its fused head is ours.

verl takes it from the logits (`calculate_sum_pi_squared`), which a fused head does not make; so it
refuses the two together. Here the head gives it besides, as `collision`, and the engine's own code
lays it out as it does the entropies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

ENGINE = "verl.workers.engine.fsdp.transformer_impl"
_found: ContextVar[list[Tensor] | None] = ContextVar("collisions of a forward pass", default=None)


def found_so_far() -> list[Tensor] | None:
    """Where the head is to put the collisions of its tokens; None where nobody asks for them."""
    return _found.get()


class SumsOfSquares:
    """verl's FSDP engine, taught to give sum_pi_squared with `use_fused_kernels`."""

    def __init__(self) -> None:
        self.finder = _WhenLoaded(ENGINE, self.teach)
        self.own: dict[str, Callable] = {}

    def switch_on(self) -> None:
        """Now, or when the engine is loaded: it looks at once what the platform is, which modules
        that are named after this one may still say."""
        if ENGINE in sys.modules:
            self.teach(sys.modules[ENGINE])
        elif self.finder not in sys.meta_path:
            sys.meta_path.insert(0, self.finder)

    def switch_off(self) -> None:
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        for name, method in self.own.items():
            setattr(sys.modules[ENGINE].FSDPEngineWithLMHead, name, method)
        self.own.clear()

    def teach(self, module: Any) -> None:
        engine, data = module.FSDPEngineWithLMHead, module.tu
        self.own = {
            name: getattr(engine, name) for name in ("forward_step", "prepare_model_outputs")
        }
        engine.forward_step = _asking(self.own["forward_step"], data)
        engine.prepare_model_outputs = _laying_out(self.own["prepare_model_outputs"], data)


def _asking(own: Callable, data: Any) -> Callable:
    @wraps(own)
    def forward_step(self, micro_batch, *args, **kwargs):
        names = ("calculate_sum_pi_squared", "use_fused_kernels")
        wanted = all(
            data.get_non_tensor_data(micro_batch, key=name, default=False) for name in names
        )
        token = _found.set([] if wanted else None)
        try:
            return own(self, micro_batch, *args, **kwargs)
        finally:
            _found.reset(token)

    return forward_step


def _laying_out(own: Callable, data: Any) -> Callable:
    @wraps(own)
    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        found = found_so_far()
        if not found:  # nobody asks, or another head has been at work: verl says so
            return own(self, output, output_args, micro_batch, logits_processor_func)
        plain = micro_batch.copy()
        data.assign_non_tensor(plain, calculate_sum_pi_squared=False)
        result = own(self, output, output_args, plain, logits_processor_func)
        log_probs = output.log_probs.detach()
        squares = SimpleNamespace(log_probs=log_probs, entropy=found[-1].view_as(log_probs))
        data.assign_non_tensor(plain, calculate_entropy=True, distillation_use_topk=False)
        result["sum_pi_squared"] = own(self, squares, output_args, plain, None)["entropy"]
        return result

    return prepare_model_outputs


class _WhenLoaded(MetaPathFinder):
    """Calls `then` with a module once it has been loaded."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                self.then(module)

            spec.loader.exec_module = exec_module
        return spec
