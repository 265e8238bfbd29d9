"""Settings and fixtures every test shares."""

import importlib.util
import os
import random
import sys

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("contract", "helpers")
pytest.register_assert_rewrite("gpu_chunks", "gpu_stages", "peft_models", "truncated_rows")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton


def _interpret_faster():
    """Before every call of a function, also of one that a kernel calls, Triton's interpreter looks
    through the whole language for what it is to replace: half its time. Here it does so once a
    launch and module."""
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope")):
        return  # another Triton, whose interpreter is as slow as it is
    whole, done = interpreter._patch_lang, set()

    def patch(function):
        module = id(function.__globals__)
        if module in done:
            return interpreter._LangPatchScope()
        scope = whole(function)
        if not done:  # a launch, which puts back at its end what is replaced until then
            restore = scope.restore
            scope.restore = lambda: (done.clear(), restore())
        done.add(module)
        return scope

    interpreter._patch_lang = patch


if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    _interpret_faster()

# One thread per test process: `pytest -n` is what uses the other cores.
torch.set_num_threads(1)

EVERY_TIME = dict(deadline=None, database=None, print_blob=True)
hypothesis.settings.register_profile("em_kernels", derandomize=True, **EVERY_TIME)
hypothesis.settings.register_profile("fuzz", **EVERY_TIME)  # of make fuzz
hypothesis.settings.load_profile("em_kernels")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def device(impl: str) -> str:
    """Where the tensors of a test of backend `impl` live: on the GPU if there is one."""
    return "cuda" if impl != "cpu" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def tensors_there(device: str):
    """New tensors live there, unless told."""
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def nan_filled_memory():
    """New tensors start as NaN, so that an element a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def patient_judge(monkeypatch):
    """An answer is not found wrong because the machine is busy."""
    from em_kernels.lm.judge import judges

    monkeypatch.setattr(judges, "TIME_LIMIT_SECONDS", 600)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Of a class that takes a sample, each test's first case and a seeded part of the others."""
    seen, kept, left_out = set(), [], []
    for item in items:
        share = getattr(item.cls, "SAMPLE", 1.0)
        drawn = item.originalname not in seen or random.Random(item.name).random() < share
        seen.update({item.originalname} if share < 1 else ())
        (kept if share == 1 or drawn else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under `-n` all tests of a file are made by one process: what they share is made once. On a
    GPU not, since such a process may end, and xdist gives the test it ended in to the next."""
    if config.getvalue("dist") != "load" or torch.cuda.is_available():
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_runtest_logreport(report):
    """A failure that has cost the GPU ends the process: under xdist another takes its place."""
    if not report.failed or not torch.cuda.is_available() or torch.cuda.is_initialized() is False:
        return
    from benchmarks.common import is_lost

    if is_lost("cuda"):
        why = f"{report.nodeid} has cost this process the GPU"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(why, returncode=1)
        print(why, file=sys.__stderr__, flush=True)
        os._exit(1)
