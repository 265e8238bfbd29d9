"""A pytest plugin: tests run as where a GPU is, on tensors without contents.

    python -m pytest -p pretended_gpu --assert=plain tests

torch says that there is a GPU, so every file is collected as it would be on one. Of each test
function one case per GPU backend is run, on fake tensors, which know their device and nothing else.
What is asserted is computed and not looked at; a test ends where it needs a content that cannot be
made up. What counts is that until there no tensor of the CPU was given to a GPU backend and no
operation had operands on two devices.
"""

from __future__ import annotations

import ast
import importlib
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.synchronize = lambda device=None: None
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
    **dict(name="pretended", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132),
    **dict(L2_cache_size=50 << 20, regs_per_multiprocessor=65536, warp_size=32),
)

from em_kernels.backends import choice  # noqa: E402

ON_GPU, BARE = ("triton", "cuda"), torch.device("cuda")
TWO_DEVICES = ("two different devices", "on the same device", "must be on a GPU")


def _on_a_gpu(device):
    on_cpu = device is not None and device.type == "cpu"
    return "its tensors must be on a GPU" if on_cpu else None


for impl in ON_GPU:
    importlib.import_module(choice.OPTIONAL[impl].module).why_not = _on_a_gpu


def _grad(outputs, inputs, grad_outputs=None, *args, **kwargs):
    """Gradients without contents; those that go in must be where the outputs are."""
    listed = [(x if isinstance(x, (tuple, list)) else [x]) for x in (outputs, grad_outputs, inputs)]
    for output, given in zip(listed[0], listed[1], strict=False):
        if given is not None and given.device != output.device:
            raise RuntimeError(f"two different devices: {given.device} upstream of {output.device}")
    return tuple(torch.zeros_like(x) for x in listed[2])


# Autograd itself asks for the streams of the GPU.
torch.autograd.grad = _grad
torch.enable_grad = torch.no_grad
torch.Tensor.backward = lambda self, *args, **kwargs: None
torch.Tensor.requires_grad_ = lambda self, requires_grad=True: self


def made_up(dtype: torch.dtype):
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


class Unasserted(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.copy_location(ast.Expr(node.test), node)


def _get_code(loader, name):
    """The code of a test file with its assertions as expressions, and never from a cache."""
    path = Path(loader.path)
    if not path.name.startswith("test_"):
        return get_code(loader, name)
    tree = Unasserted().visit(ast.parse(path.read_bytes(), str(path)))
    return compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)


get_code = SourceFileLoader.get_code
SourceFileLoader.get_code = _get_code


class Watch(TorchDispatchMode):
    """Looks at what GPU backends are given, and makes up the numbers that Python asks for."""

    def __init__(self):
        super().__init__()
        self.served = 0
        self.faults: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "em_kernels":
            self.look_at(function, args)
        if function is torch.ops.aten._local_scalar_dense.default:
            return made_up(args[0].dtype)
        if function is torch.ops.aten.equal.default:
            return True
        return function(*args, **(kwargs or {}))

    def look_at(self, function, args) -> None:
        """`numbers` are read by Python and stay on the CPU."""
        given = {about.name: x for about, x in zip(function._schema.arguments, args)}
        if given.pop("impl", None) not in ON_GPU:
            return
        given.pop("numbers", None)
        devices = {x.device.type for x in tree_leaves(given) if isinstance(x, torch.Tensor)}
        self.served += "cuda" in devices
        if "cpu" in devices:
            self.faults.append(f"{function} was given a tensor of the CPU")


class Stand(TorchFunctionMode):
    """What C++ does before an operation is seen, and asks the GPU for: done without it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(function, (OpOverload, OpOverloadPacket)):
            return function(*args, **kwargs)
        args, kwargs = tree_map(_numbered, (args, kwargs))
        if function is torch.Tensor.__setitem__ and args[0].device.type == "cuda":
            return None
        if function is torch.Tensor.__getitem__ and args[0].device.type == "cuda":
            return _empty(_empty(args[0], "meta")[_on_meta(args[1])], args[0].device)
        if function is torch.tensor and kwargs.get("device", None) == torch.device("cuda", 0):
            return _empty(torch.tensor(*args, **{**kwargs, "device": "cpu"}), kwargs["device"])
        if function is torch.Tensor.to and not isinstance(args[0], FakeTensor):
            args = (_empty(args[0], args[0].device), *args[1:])
        return function(*args, **kwargs)


def _numbered(x):
    """ "cuda" is "cuda:0": which one is current only a real one can say."""
    bare = x == "cuda" if isinstance(x, str) else isinstance(x, torch.device) and x == BARE
    return torch.device("cuda", 0) if bare else x


def _empty(x, device):
    """As `x`, without contents."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def _on_meta(index):
    return tree_map(lambda x: _empty(x, "meta") if isinstance(x, torch.Tensor) else x, index)


FAKE = FakeTensorMode(allow_non_fake_inputs=True)
left_out: set[str] = set()  # files that need what is not installed


def pytest_collectreport(report):
    if report.skipped:
        left_out.add(report.nodeid)


def pytest_collection_modifyitems(config, items):
    """Every file has been imported; what is run is one case a function and GPU backend."""
    config.seen = {item.path.name for item in items}
    kept: dict[tuple, pytest.Item] = {}
    for item in items:
        impl = getattr(item, "callspec", None) and item.callspec.params.get("impl")
        if impl in ON_GPU and not hasattr(item.obj, "hypothesis"):
            kept.setdefault((item.path, item.originalname, impl), item)
    items[:] = kept.values()
    config.served, config.faults = 0, []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        with torch.no_grad(), FAKE, Stand():
            yield
    except Exception as reason:
        pytest.skip(f"its fixtures cannot be pretended: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    watch = Watch()
    try:
        with torch.no_grad(), FAKE, watch, Stand():
            yield
    except (Exception, pytest.fail.Exception) as reason:
        if any(words in str(reason) for words in TWO_DEVICES):
            watch.faults.append(" ".join(str(reason).split())[:300])
    pyfuncitem.config.served += watch.served > 0
    pyfuncitem.config.faults += [f"{pyfuncitem.nodeid}: {fault}" for fault in set(watch.faults)]
    return True


def pytest_terminal_summary(terminalreporter, config):
    say = terminalreporter.write_line
    say(f"{len(config.seen | left_out)} files were looked at")
    say(f"{config.served} tests gave tensors to a GPU backend")
    for fault in config.faults:
        say(f"FAULT {fault}")
