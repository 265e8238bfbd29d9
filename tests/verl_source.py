"""verl's own modules, where the package is installed, without the packages that it needs to run.

verl imports ray, tensordict and more; the formulas compared here need none of them. So its files
are loaded one by one, with stand-ins for what they import and these formulas do not use.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

STAND_INS = (
    "omegaconf",
    "tensordict",
    "verl",
    "verl.protocol",
    "verl.trainer",
    "verl.trainer.config",
    "verl.trainer.config.algorithm",
    "verl.trainer.ppo",
    "verl.utils",
    "verl.utils.device",
    "verl.utils.import_utils",
    "verl.utils.kernel",
    "verl.utils.experimental",
    "verl.workers",
    "verl.workers.config",
    "verl.workers.config.actor",
)
SOURCES = (
    "verl.utils.torch_functional",
    "verl.utils.experimental.torch_functional",
    "verl.utils.kernel.linear_cross_entropy",
    "verl.trainer.ppo.core_algos",
    "verl.trainer.ppo.rollout_corr_helper",
)


class StandIn(ModuleType):
    """A module in which every name is there: a bare class, or a function that refuses to run."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {}) if name[0].isupper() else _refusing(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


def _refusing(name: str):
    def function(*args, **kwargs):
        raise NotImplementedError(f"{name} is a stand-in")

    return function


def _no_decorator(*args, **kwargs):
    return lambda function: function


def load(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """verl's modules by name, in `sys.modules` for the length of the test."""
    root = _root()
    for name in STAND_INS:
        _install_stand_in(name, monkeypatch)
    sys.modules["verl.utils.import_utils"].deprecated = _no_decorator
    return {name: _execute(root, name, monkeypatch) for name in SOURCES}


def _root() -> Path:
    """The folder that verl is in, found once: stand-ins hide it."""
    if not _roots:
        found = importlib.util.find_spec("verl")
        if found is None:
            pytest.skip("verl is not installed")
        _roots.append(Path(next(iter(found.submodule_search_locations))).parent)
    return _roots[0]


_roots: list[Path] = []
_edited: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


def _execute(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch, edits: tuple[tuple[str, str], ...] = ()
) -> ModuleType:
    path = root.joinpath(*name.split(".")).with_suffix(".py")
    if edits:
        text = path.read_text()
        for old, new in edits:
            assert old in text, f"{old!r} is no longer in {path}"
            text = text.replace(old, new)
        _edited.append(tempfile.TemporaryDirectory())
        path = Path(_edited[-1].name, path.name)  # Triton reads the source of its kernels
        path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    _install(module, monkeypatch)
    spec.loader.exec_module(module)
    return module


def _install_stand_in(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StandIn(name)
    module.__path__ = []
    _install(module, monkeypatch)


def _install(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module.__name__, module)
    parent, _, child = module.__name__.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


MEGATRON = (
    "megatron",
    "megatron.core",
    "megatron.core.parallel_state",
    "megatron.core.config_logger",
    "megatron.core.inference",
    "megatron.core.inference.contexts",
    "megatron.core.models",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.packed_seq_params",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.utils",
    "verl.models",
    "verl.models.mcore",
    "verl.models.mcore.util",
    "verl.utils.megatron_utils",
    "verl.utils.model",
)


def load_fused_forward(monkeypatch: pytest.MonkeyPatch, gather, group) -> ModuleType:
    """verl's callers of the fused head over Megatron, after `load`; `gather` and `group` stand for
    Megatron's gather_from_sequence_parallel_region and get_tensor_model_parallel_group."""
    for name in MEGATRON:
        _install_stand_in(name, monkeypatch)
    core = sys.modules["megatron.core"]
    core.tensor_parallel.mappings.gather_from_sequence_parallel_region = gather
    core.parallel_state.get_tensor_model_parallel_group = group
    core.config_logger.has_config_logger_enabled = lambda config: False
    core.utils.deprecate_inference_params = lambda context, params: context
    sys.modules["verl.utils.model"].CausalLMOutputForPPO = SimpleNamespace
    return _execute(_root(), "verl.models.mcore.model_forward_fused", monkeypatch)


def load_kernels(monkeypatch: pytest.MonkeyPatch):
    """verl's LinearCrossEntropy on Triton's interpreter: its tensors on the CPU, its splits of the
    vocabulary small, its streams none."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("verl", "verl.utils", "verl.utils.device", "verl.utils.kernel"):
        _install_stand_in(name, monkeypatch)
    device = sys.modules["verl.utils.device"]
    device.get_device_capability, device.is_cuda_available = lambda: (8, 0), False
    device.get_torch_device = lambda: _NoStreams
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda text: contextlib.nullcontext())
    store = InterpreterBuilder.create_masked_store

    def with_bool_mask(self, pointers, value, mask, *args):
        mask.data = mask.data.astype(bool)
        return store(self, pointers, value, mask, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", with_bool_mask)
    edits = (
        (".is_cuda", ".is_cpu"),
        ("split = 9504", "split = 128"),
        ("split = 1024", "split = 128"),
    )
    _execute(_root(), "verl.utils.kernel.kernels", monkeypatch, edits)
    head = _execute(_root(), "verl.utils.kernel.linear_cross_entropy", monkeypatch)
    return head.LinearCrossEntropy.apply


class _NoStreams:
    """torch.cuda as far as verl's head uses it."""

    def __init__(self, *args):
        pass

    @staticmethod
    def current_stream():
        return _NoStreams()

    @staticmethod
    def stream(stream):
        return contextlib.nullcontext()

    def record_event(self, event):
        pass

    wait_event = record_event


_NoStreams.Stream = _NoStreams.Event = _NoStreams
