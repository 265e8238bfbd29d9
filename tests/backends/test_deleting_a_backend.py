"""Deleting a backend is deleting its files and one line of choice.py: in a copy of the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import em_kernels

PACKAGE = Path(em_kernels.__file__).parent
FILES = {
    "cpu": ("cpu.py", "backends/cpu.py", "_C.*"),
    "triton": ("backends/triton",),
    "cuda": ("backends/cuda.py", "_cuda.*"),
}
CODE = """
import sys
import torch
import em_kernels
from em_kernels.backends import choice, vocab_parallel
from em_kernels.backends.interface import RowSpec

gone, said, none_fuses = sys.argv[1:]
CPU = torch.device("cpu")
names = em_kernels.backends()
assert set(names) == {"reference", "cpu", "triton", "cuda"} - {gone}, names
assert f"em_kernels.backends.{gone}" not in sys.modules
assert not any(gone in able.name for able in choice.serving(CPU))

logits, target = torch.randn(4, 60), torch.arange(4)
ones, hidden, weight = torch.ones(4), torch.randn(4, 8), torch.randn(60, 8)
grads = {}
for impl in ("auto", *(name for name in names if choice.why_not(name, CPU) is None)):
    x, w = logits.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = em_kernels.token_loss(x, target, entropy_weight=ones, impl=impl).loss
    options = dict(logprob_weight=ones, impl=impl)
    loss = loss + em_kernels.linear_token_loss(hidden, w, target, **options).loss
    (3 * loss).sum().backward()
    stats = em_kernels.linear_softmax_stats(hidden, weight, target, impl=impl)
    (z,) = torch.ops.em_kernels.entropy_descent(logits, 0.3, 1.0, 2, impl)
    (heat,) = torch.ops.em_kernels.entropy_temperature(logits, 0.3, 0.0, 0.05, 3, impl)
    chosen = choice.backend(impl, CPU)
    spec = RowSpec(valid_vocab=60)
    assert (vocab_parallel.count_present(chosen, logits[None], spec, None) == 60).all()
    grads[impl] = [x.grad, w.grad, stats.logprob, stats.entropy, z, heat]
for impl, results in grads.items():
    torch.testing.assert_close(results, grads["reference"], msg=impl)

try:
    em_kernels.softmax_stats(logits, impl=gone)
except ValueError as error:
    assert said in str(error), error
else:
    raise AssertionError("it is still served")
try:
    em_kernels.linear_softmax_stats(hidden, weight, target, fuse_product=True, impl="reference")
except ValueError as error:
    assert "impl must be" in str(error) and repr(gone) not in str(error), error
else:
    raise AssertionError("it is fused by the reference")
try:
    fused = em_kernels.linear_softmax_stats(hidden, weight, target, fuse_product=True)
    torch.testing.assert_close(fused.entropy, stats.entropy)
except ValueError as error:
    assert none_fuses in str(error) and (gone == "triton" or names["triton"] != "available"), error
"""


@pytest.fixture
def without(tmp_path):
    """The copy without the files of a backend."""

    def copy(gone):
        package = tmp_path / "em_kernels"
        for room in ("backends", "linear", "ops"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PACKAGE / room, package / room, ignore=ignored)
        for file in (*PACKAGE.glob("*.py"), *PACKAGE.glob("_*.so"), *PACKAGE.glob("_*.pyi")):
            (package / file.name).symlink_to(file)
        for pattern in FILES[gone]:
            for path in package.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return package / "backends/choice.py"

    return copy


def run(folder, code, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.parametrize("gone", FILES)
def test_the_others_go_on(gone, without, tmp_path):
    choice = without(gone)
    lines = choice.read_text().splitlines(keepends=True)
    kept = [line for line in lines if f'"em_kernels.backends.{gone}"' not in line]
    assert len(lines) - len(kept) == 1
    choice.write_text("".join(kept))
    fuses = "the Triton backend" if gone != "triton" else "a backend that multiplies by itself"
    done = run(tmp_path, CODE, gone, "impl must be one of ('auto', 'reference', ", fuses)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("gone", FILES)
def test_files_that_are_missing_are_told(gone, without, tmp_path):
    without(gone)
    code = "import em_kernels; print(em_kernels.backends()); "
    code += "from em_kernels.backends import choice; import torch; "
    code += "print(choice.backend('auto', torch.device('cpu')).name)"
    done = run(tmp_path, code)
    assert f"No module named 'em_kernels.backends.{gone}'" in done.stdout, done.stderr
    served = "cpu" if "'cpu': 'available'" in done.stdout else "reference"
    assert done.stdout.endswith(f"{served}\n")
