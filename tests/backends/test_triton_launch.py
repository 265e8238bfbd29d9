"""How the Triton kernels are launched, and what they compile to for GPUs that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the Triton backend needs triton")
import triton
import triton_cases
import triton_code
import triton_offline
from triton_rows import DEVICE, DTYPES, NAMES, grad, plan_small_steps, stats, upstream

from em_kernels.backends.interface import ROW_OUTPUTS, RowSpec, Saved, Upstream
from em_kernels.backends.triton import kernels, launch, linear
from em_kernels.backends.triton.backend import Triton

backend = Triton()

EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
UP = Upstream(entropy=torch.ones(1, device="meta"))


@pytest.fixture
def small_plan(monkeypatch):
    monkeypatch.setattr(launch, "plan", plan_small_steps)


def test_no_rows():
    logits = torch.empty(1, 0, 5, device=DEVICE)
    spec = RowSpec(valid_vocab=5)
    assert [tuple(r.shape) for r in backend.stats(logits, spec, ("entropy",))] == [(0,)] * 4
    backend.grad(logits, spec, Saved(*[logits.new_empty(0)] * 3), Upstream(), logits)


def test_rows_beyond_two_to_the_31_elements(small_plan):
    """Row 1 starts 2^31 elements in; memory that is not touched is not used."""
    try:
        storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4.3 GB of address space")
    logits = storage.as_strided((2, 1, 128), (2**31, 128, 1))
    logits.copy_(torch.randn(2, 1, 128))
    spec = RowSpec(target=torch.tensor([3, 4], device=DEVICE), valid_vocab=128)
    want, up = stats(logits.clone(), spec), upstream(logits)
    got = dict(zip(NAMES, backend.stats(logits, spec, ROW_OUTPUTS)))
    assert all(torch.equal(got[name], want[name]) for name in NAMES)
    dense = grad(logits.clone(), spec, up)
    assert torch.equal(grad(logits, spec, up, out=logits), dense)


def test_weights_beyond_two_to_the_31_elements(monkeypatch):
    """Row 2 of the weights starts 2^31 elements in."""
    try:
        storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("needs 4.3 GB of address space")
    small = linear.Launch(linear.Tile(16, 16, 16, walk=1, group=1, cuts=0), 1, 1)
    monkeypatch.setattr(linear, "plan", lambda dtype, light, shared_memory: small)
    hidden, weight = (
        torch.randn(2, 16).bfloat16().to(DEVICE),
        storage.as_strided((3, 16), (2**30, 1)),
    )
    weight.copy_(torch.randn(3, 16))
    spec = RowSpec(target=torch.tensor([2, 0], device=DEVICE), valid_vocab=3)
    got = linear.linear_stats(hidden, weight, spec, ROW_OUTPUTS)
    want = linear.linear_stats(hidden, weight.clone(), spec, ROW_OUTPUTS)
    assert all(map(torch.equal, got, want))


class Recorder:
    """Stands in for a kernel and keeps what it would be launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **kwargs: setattr(self, "arguments", kwargs)


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    for name in ("statistics", "gradient", "loss"):
        monkeypatch.setattr(kernels, name, recorder)
    return recorder


VOCABULARIES = sorted(
    {2**k + d for k in range(19) for d in (-1, 0, 1)} - {0, 2**18 + 1}
    | {1000, 32000, 50257, 128256, 129280, 151936, 152064, 200019}
)
LAYOUTS = {
    "dense": lambda x: x,
    "shifted": lambda x: x[:, :-1],
    "every other": lambda x: x[:, ::2],
    "padded": lambda x: x[..., : x.shape[-1] // 2 + 1],
    "swapped": lambda x: x.transpose(0, 1),
    "one row repeated": lambda x: x[:1, :1].expand(70_000, 1, -1),
}


@EACH_DTYPE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches(recorder, dtype, layout):
    """One program per row whatever N, V and the strides, N > 65535 and N * V > 2^31 among them."""
    largest = 0
    for vocab in VOCABULARIES:
        x = LAYOUTS[layout](torch.empty(300, 301, vocab, dtype=dtype, device="meta"))
        outer, inner, vocab = x.shape
        row = torch.empty(outer * inner, device="meta")
        spec = RowSpec(valid_vocab=vocab)
        for call in (
            lambda x=x, spec=spec: backend.stats(x, spec, ("entropy",)),
            lambda x=x, spec=spec, row=row: backend.grad(x, spec, Saved(row, row, row), UP, x),
            lambda x=x, spec=spec: backend.loss(x, spec, UP, ("entropy",), x),
        ):
            call()
            assert recorder.grid == (outer * inner,) and recorder.grid[0] < 2**31
            assert recorder.arguments["vocab"] == recorder.arguments["valid"] == vocab
            for view in [
                recorder.arguments[k] for k in ("view", "out_view") if k in recorder.arguments
            ]:
                for i in (0, 1, inner - 1, inner, outer * inner - 1):
                    at = i // view.inner * view.stride_outer + i % view.inner * view.stride_inner
                    assert at == i // inner * x.stride(0) + i % inner * x.stride(1)
                    largest = max(largest, at)
    assert largest > 2**31 or layout == "one row repeated"


@EACH_DTYPE
def test_narrow_launches(recorder, dtype):
    """Rows of a narrow gradient begin at the bytes where those of the logits do."""
    x = torch.empty(3, 5, 64, dtype=dtype, device="meta")
    for narrow in (torch.bfloat16, torch.float16):
        ratio = dtype.itemsize // 2
        out = x.view(narrow)[..., :64]
        backend.loss(x, RowSpec(valid_vocab=64), UP, (), out)
        view, out_view = (recorder.arguments[name] for name in ("view", "out_view"))
        assert out_view == (view.inner, ratio * view.stride_outer, ratio * view.stride_inner)


def test_views():
    """One stride where one will do, so that no kernel is compiled for a number of rows."""
    x = torch.empty(4, 5, 8)
    many = 2**31 - 1
    assert launch.View.of(x) == (many, 0, 8)
    assert launch.View.of(x[:1]) == (many, 0, 8)
    assert launch.View.of(x[:, :1]) == (many, 0, 40)
    assert launch.View.of(x[:, :-1]) == (4, 40, 8)


@EACH_DTYPE
@pytest.mark.parametrize("capped", [False, True])
def test_plan(dtype, capped):
    """Powers of two, 16 bytes a thread, warps for a row's length and no more; the steps and the
    blocks after them, of which at most `slices` are read, end at the end of the row."""
    for vocab in VOCABULARIES:
        block, slices, num_warps, part = launch.plan(vocab, dtype, capped)
        assert block & (block - 1) == 0 and num_warps & (num_warps - 1) == 0
        assert block * dtype.itemsize == num_warps * 32 * 16
        assert 1 <= num_warps <= 8 and slices == (2 if capped else 4)
        assert num_warps == 1 or block < 2 * vocab
        whole = vocab // (block * slices) * (block * slices)
        assert part % (block * slices) == 0
        rest = len(range(whole, vocab, block))
        assert rest <= slices and whole + rest * block >= vocab > whole + (rest - 1) * block


ANOTHER_HOW = {
    "float64": (torch.float64, {}, ("entropy",)),
    "softcap": (torch.float32, dict(softcap=30.0), ("entropy",)),
    "temperature": (torch.float32, dict(temperature=0.7), ("entropy",)),
    "rows": (torch.float32, dict(temperature_rows=torch.ones(3)), ("entropy",)),
    "second order": (torch.float32, {}, ("varentropy",)),
    "moments": (torch.float32, {}, ("logit_mean",)),
    "top1": (torch.float32, {}, ("is_top1",)),
    "vocabulary": (torch.float32, dict(valid_vocab=100), ("entropy",)),
}


def test_what_a_kernel_is_compiled_for_is_made_once(recorder):
    """The same constexprs again where a call asks for the same, so that finding its kernel compares
    none of them in Python; others where it does not."""

    def how(dtype, options, outputs):
        spec = RowSpec(**{"valid_vocab": 5000, **options})
        backend.stats(torch.empty(1, 3, 5000, dtype=dtype, device="meta"), spec, outputs)
        return recorder.arguments["how"]

    usual = how(torch.float32, {}, ("entropy",))
    for _ in range(2):
        again = how(torch.float32, dict(softcap=0.0, temperature=1.0), ("entropy",))
        assert all(a is b for a, b in zip(again, usual, strict=True))
    for name, call in ANOTHER_HOW.items():
        other = how(*call)
        assert [c.value for c in other] != [c.value for c in usual], name
        assert all(a is b for a, b in zip(how(*call), other, strict=True)), name


@pytest.mark.parametrize("memory", [0, 64 << 10, 99 << 10, 163 << 10, 227 << 10])
@EACH_DTYPE
def test_plan_of_tiles(dtype, memory):
    """A part of the vocabulary is 1024 entries whatever the tile; its buffers fit."""
    for light in (False, True):
        tile, num_warps, num_stages = linear.plan(dtype, light, memory)
        assert tile.walk * tile.entries == 1024 and num_warps == 8
        assert all(n & (n - 1) == 0 and n >= 16 for n in tile[:3])
        assert tile.entries >> tile.cuts >= 16  # a slice is whole runs of a thread's columns
        stage = (tile.rows + tile.entries) * tile.depth * dtype.itemsize
        assert 1 <= num_stages <= 4 and (num_stages == 1 or num_stages * stage <= memory)


@pytest.mark.parametrize("setting, interpreted", [("true", True), ("on", True), ("0", False)])
def test_interpreted_is_what_triton_reads(setting, interpreted):
    code = "from em_kernels import backends; "
    code += "from em_kernels.backends.triton.backend import interpreted; "
    code += "print(interpreted, backends())"
    environment = {**os.environ, "TRITON_INTERPRET": setting}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.startswith(str(interpreted)), done.stderr
    if interpreted or not torch.cuda.is_available():
        assert ("'triton': 'available'" in done.stdout) == interpreted


@pytest.fixture(scope="module")
def offline_report():
    """Compiled in a process of its own: here `triton.jit` may have made interpreted functions."""
    if not triton_code.CUOBJDUMP.exists():
        pytest.skip(f"this triton has no cuobjdump at {triton_code.CUOBJDUMP}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, triton_offline.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def kernel_report(offline_report):
    return offline_report["kernels"]


EACH_ARCH = pytest.mark.parametrize("arch", [f"sm_{a}" for a in triton_offline.ARCHITECTURES])


@EACH_ARCH
def test_compiled_kernels(kernel_report, arch):
    """Offsets of 64 bits, no spills in inner loops; with the version on record none at all and no
    more registers than there."""
    record = json.loads(triton_offline.TABLE.read_text())
    table = record["registers, stack bytes"][arch]
    assert kernel_report[arch].keys() == table.keys()
    for name, found in kernel_report[arch].items():
        assert found["wide_offsets"], f"{name} has offsets of 32 bits"
        assert found["spilled"] == 0, f"{name}: {found['spilled']} spills in inner loops"
        if triton.__version__ == record["triton"]:
            assert found["stack"] == 0, f"{name} spills {found['stack']} bytes"
            again = f"{name}: if meant, run triton_offline.py --write"
            assert found["registers"] <= table[name][0], again


SPILLS = """
/*0000*/ STL [R1+0x4], R5 ;
/*0010*/ LDL R6, [R1+0x4] ;
/*0020*/ @P0 LDL.LU R7, [R1] ;
/*0030*/ STL.64 [R1], R8 ;
/*0040*/ LDG.E R9, [R2] ;
/*0050*/ @P1 BRA 0x20 ;
/*0060*/ @!P1 BRA 0x10 ;
"""


def test_spills_are_counted_in_inner_loops():
    assert triton_code.spilled(SPILLS) == 2
    assert triton_code.spilled(SPILLS.replace("0x20", "0x40")) == 0


@EACH_ARCH
def test_what_the_loop_over_a_row_issues(kernel_report, arch):
    """No more instructions an entry and no narrower loads than on record for this version."""
    record = json.loads(triton_offline.TABLE.read_text())
    table = record["instructions an entry, bytes a load, a store"][arch]
    costs = {name: f["cost"] for name, f in kernel_report[arch].items() if f["cost"]}
    assert costs.keys() == table.keys()
    if triton.__version__ == record["triton"]:
        for name, (instructions, *widths) in costs.items():
            again = f"{name}: if meant, run triton_offline.py --write"
            assert instructions <= table[name][0] and widths >= table[name][1:], again


@EACH_ARCH
def test_what_a_step_along_the_depth_issues(kernel_report, arch):
    """As many products, in no more instructions and shared memory than on record."""
    record = json.loads(triton_offline.TABLE.read_text())
    table = record["instructions, products of a step along D, shared bytes"][arch]
    steps = {name: f["step"] for name, f in kernel_report[arch].items() if f["step"]}
    assert steps.keys() == table.keys()
    if triton.__version__ == record["triton"]:
        for name, (instructions, products, shared) in steps.items():
            most, want, room = table[name]
            again = f"{name}: if meant, run triton_offline.py --write"
            assert instructions <= most and products == want and shared <= room, again


@EACH_ARCH
def test_no_difference_is_fused_with_a_product(offline_report, arch):
    """z - max is 0 at the maximum only if z has been rounded: u c - max, rounded once, is not."""
    kernels = offline_report["fused"][arch]
    assert len(kernels) == len(triton_cases.SCALES) * (4 + 2) + 2
    for name, (fuses, differences) in kernels.items():
        assert not fuses and not differences, f"{name}: {differences}"


def test_a_fused_difference_would_be_found(offline_report):
    """The same kernels with fusion on have what the test above looks for."""
    found = offline_report["fusing"]
    assert found.keys() == {
        f"{n}-temperature" for n in ("stats", "grad", "loss", "narrow", "linear")
    }
    for name, differences in found.items():
        assert differences, name


@EACH_ARCH
def test_loops_over_a_row(kernel_report, arch):
    """16-byte loads, or words where rows begin anywhere; 16-byte stores, or 8 of a narrow gradient;
    the fast exponential, no slow instruction, and no data that moves between threads."""
    for name, found in kernel_report[arch].items():
        if not name.startswith("linear"):
            _, load, store = found["cost"]
            assert load == (4 if name.endswith("odd") else 16), f"{name} has no 16-byte loads"
            assert store in (0, 8 if "narrow" in name else 16), f"{name} stores {store} bytes"
            counts_only = name.startswith("above_ids")
            assert found["loop_exponentials"] > 0 or "float64" in name or counts_only
            # Loops over loops over a row, and the join of the moments of its parts.
            passes = name.startswith(("temperature", "descent")) or name.endswith("all")
            assert passes or not found["slow_in_loops"], f"{name}: {found['slow_in_loops']}"
            assert found["shared"] <= 64 or "float64" in name, f"{name} moves data between threads"


@EACH_ARCH
def test_only_narrowing_kernels_wait_between_loads_and_stores(kernel_report, arch):
    for name, found in kernel_report[arch].items():
        if name.startswith(("grad", "loss")):
            writes = "LBS" if "narrow" in name else "LS"
            assert found["accesses"][-3:] == [writes, 2 * writes, "S"], name


@EACH_ARCH
def test_no_pass_over_a_row_overtakes_another(kernel_report, arch):
    """Other threads read what one has written: barriers before the first store and after the
    last. The bisection stores nothing of its row."""
    assert kernel_report[arch]["descent-float32"]["accesses"][-2:] == ["LB", "LSB"]
    loops = kernel_report[arch]["temperature-bfloat16"]["accesses"]
    assert all("S" not in loop for loop in loops[:-1])


@EACH_ARCH
def test_programs_that_share_a_row_hand_it_over(kernel_report, arch):
    """All have stored before their program counts itself in, and read only after; and both ways to
    a row sum its lanes in one order: a thread has the same two."""
    found, alone = (kernel_report[arch][f"stats-bfloat16-{n}"] for n in ("shared", "plain"))
    assert found["handover"].startswith("SBABL")
    assert set(found["reductions"]) == set(alone["reductions"]) == {"2 of 32 of 8"}


def test_on_amd(offline_report):
    """Warps of 64: 16-byte loads and stores there too, and no more barriers than merging takes."""
    for name, (loads, stores, barriers) in offline_report["amd"].items():
        assert loads > 0 and (stores > 0 or name.startswith("stats")), name
        assert barriers <= 11, name


@EACH_ARCH
def test_products_of_tiles(kernel_report, arch):
    """On the tensor cores by the architecture's own instruction, out of shared memory that is
    filled 16 bytes at a time, or from sm_90 on in blocks and without a 64-bit product; float32
    stays off them."""
    tensor_cores = {"sm_80": ["mma"], "sm_90": ["wgmma"], "sm_100": ["tcgen05"]}[arch]
    for name, found in kernel_report[arch].items():
        if name.startswith("linear") and not name.endswith("finish"):
            want = {"bfloat16": tensor_cores, "float32": [], "float64": ["mma"]}
            assert found["product"] == want[name.split("-")[1]], name
            assert found["bulk_copies"] == (arch != "sm_80" and "bfloat16" in name), name
            assert not found["bulk_copies"] or "mul.lo.s64" not in found["slow_in_loops"], name
            assert found["bulk_copies"] or found["wide_loads"] or "float64" in name
            assert found["loop_exponentials"] > 0 or "float64" in name
            assert found["shared"] <= triton_cases.SHARED_MEMORY[int(arch[3:])], name
