"""Compile the Triton kernels for GPUs that are not here and report what the machine code uses.

    python tests/triton_offline.py            prints the report as JSON
    python tests/triton_offline.py --write    also renews tests/triton_resources.json

The kernels are compiled through their launchers, with the arguments a call on a GPU would give
them; only the launch itself is left out. A loop without a division or a 64-bit product, loads of
16 bytes, and differences that were made part of a fused multiply-add, are read off the PTX;
registers, stack (where spills go) and what the loop over a row issues off the machine code.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from sass import inner_loops
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from em_kernels.backends.interface import (
    ROW_OUTPUTS,
    Descent,
    Goal,
    RowSpec,
    Saved,
    Upstream,
    accumulate_dtype,
)
from em_kernels.backends.triton import launch, linear
from em_kernels.backends.triton.backend import Triton

backend = Triton()

ARCHITECTURES = (80, 90, 100)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of a program
PRODUCTS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
VOCAB, ODD = 151936, 151665  # rows that begin at multiples of 16 bytes, and anywhere
_COPIES = r"cp\.async\.cg\S* .*, 0x10,"  # 16 bytes to shared memory
TABLE = Path(__file__).with_name("triton_resources.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Target:
    """What Triton asks of a GPU driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(arch: int) -> Iterator[tuple[str, Callable]]:
    """Every kernel, plain, narrowing and with everything on; on sm_90 also float64 and all
    outputs."""
    for dtype in (torch.bfloat16, torch.float32):
        for capped in (False, True):
            yield from calls(dtype, capped, ("logprob", "entropy"))
    for dtype in (torch.bfloat16, torch.float32):
        yield from calls(dtype, False, ("logprob", "entropy"), ODD)
    yield from shared()
    yield from narrowing()
    yield from controls()
    yield from counted()
    yield from products(arch)
    if arch == 90:
        yield from calls(torch.float64, True, ("logprob", "entropy"))
        yield next(calls(torch.bfloat16, True, ROW_OUTPUTS))


def calls(
    dtype: torch.dtype, capped: bool, outputs: tuple[str, ...], vocab: int = VOCAB
) -> Iterator[tuple[str, Callable]]:
    logits = torch.empty(1, 16, vocab, dtype=dtype)
    row = torch.zeros(16, dtype=accumulate_dtype(dtype))
    spec = RowSpec(target=torch.zeros(16, dtype=torch.int64), valid_vocab=vocab)
    if capped:
        spec = spec._replace(
            bias=torch.zeros(VOCAB, dtype=dtype),
            mask=torch.ones(16, dtype=torch.bool),
            temperature_rows=row,
            softcap=30.0,
            logit_scale=0.5,
        )
    up, saved = Upstream(row, row), Saved(row, row, row)
    name = "-".join([str(dtype).removeprefix("torch."), "full" if capped else "plain"])
    name += "-all" if outputs == ROW_OUTPUTS else ""
    name += "-odd" if vocab == ODD else ""
    yield f"stats-{name}", lambda: backend.stats(logits, spec, outputs)
    yield f"grad-{name}", lambda: backend.grad(logits, spec, saved, up, torch.empty_like(logits))
    yield f"loss-{name}", lambda: backend.loss(logits, spec, up, outputs, logits)


def narrowing() -> Iterator[tuple[str, Callable]]:
    """float32 logits overwritten with a bfloat16 gradient."""
    logits, row = torch.empty(1, 16, VOCAB), torch.zeros(16)
    out = logits.view(torch.bfloat16)[..., :VOCAB]
    spec = RowSpec(target=torch.zeros(16, dtype=torch.int64), valid_vocab=VOCAB)
    up, saved = Upstream(row, row), Saved(row, row, row)
    yield "grad-narrow", lambda: backend.grad(logits, spec, saved, up, out)
    yield "loss-narrow", lambda: backend.loss(logits, spec, up, ("logprob", "entropy"), out)


def controls() -> Iterator[tuple[str, Callable]]:
    """A row gone through until its entropy is what it should be."""
    logits = torch.empty(1, 16, VOCAB, dtype=torch.bfloat16)
    goal, way = Goal(0.3, 0.1, 0.05, 12), Descent(0.3, 1.0, 10)
    yield "temperature-bfloat16", lambda: backend.find_temperature(logits, goal)
    yield "descent-float32", lambda: backend.descend(logits.float(), way)


def counted() -> Iterator[tuple[str, Callable]]:
    """What lies above levels: as many as a program takes, their masses too; of one, ids before it
    too."""
    levels, ids = torch.zeros(16, 4), torch.zeros(16, 1, dtype=torch.int64)
    for dtype, vocab in ((torch.bfloat16, VOCAB), (torch.float32, VOCAB), (torch.float32, ODD)):
        logits, spec = torch.empty(1, 16, vocab, dtype=dtype), RowSpec(valid_vocab=vocab)
        name = str(dtype).removeprefix("torch.") + "-odd" * (vocab == ODD)

        def masses(logits=logits, spec=spec):
            return backend.above(logits, spec, levels, levels[:, 0].contiguous())

        def places(logits=logits, spec=spec):
            return backend.above(logits, spec, levels[:, :1], None, ids)

        yield f"above-{name}", masses
        yield f"above_ids-{name}", places


def shared() -> Iterator[tuple[str, Callable]]:
    """Rows that several programs share."""
    logits = torch.empty(1, 16, VOCAB, dtype=torch.bfloat16)
    spec = RowSpec(target=torch.zeros(16, dtype=torch.int64), valid_vocab=VOCAB)

    def call():
        with patch.object(launch, "multiprocessors", lambda device: 132):
            backend.stats(logits, spec, ("logprob", "entropy"))

    yield "stats-bfloat16-shared", call


def products(arch: int) -> Iterator[tuple[str, Callable]]:
    """The product and the statistics in one kernel."""
    yield "linear-bfloat16-plain", lambda: product(arch, torch.bfloat16, False)
    yield "linear-bfloat16-full", lambda: product(arch, torch.bfloat16, True)
    if arch == 90:
        yield "linear-bfloat16-all", lambda: product(arch, torch.bfloat16, False, ROW_OUTPUTS)
        yield "linear-float32-plain", lambda: product(arch, torch.float32, False)
        yield "linear-float64-plain", lambda: product(arch, torch.float64, False)


def product(arch: int, dtype: torch.dtype, full: bool, outputs=("logprob", "entropy")) -> None:
    hidden, weight = torch.empty(256, 512, dtype=dtype), torch.empty(VOCAB, 512, dtype=dtype)
    row = torch.ones(256, dtype=accumulate_dtype(dtype))
    spec = RowSpec(target=torch.zeros(256, dtype=torch.int64), valid_vocab=VOCAB)
    if full:
        bias, mask = torch.zeros(VOCAB, dtype=dtype), torch.ones(256, dtype=torch.bool)
        spec = spec._replace(bias=bias, mask=mask, temperature_rows=row, softcap=30.0)
    products_of(arch, hidden, weight, spec, outputs)


def products_of(arch: int, hidden, weight, spec: RowSpec, outputs: tuple[str, ...]) -> None:
    with (
        patch.object(linear, "shared_memory", lambda device: SHARED_MEMORY[arch]),
        patch.object(
            linear, "copies_blocks", lambda device, dtype: arch >= 90 and dtype.itemsize == 2
        ),
    ):
        linear.linear_stats(hidden, weight, spec, outputs)


SCALES = {
    "temperature": dict(temperature=0.7),
    "rows": dict(temperature_rows=torch.ones(16)),
    "scale": dict(logit_scale=0.3),
    "bias": dict(bias=torch.zeros(VOCAB), temperature=0.7),
    "softcap": dict(softcap=30.0, temperature=0.7),
}


def scaled(arch: int) -> Iterator[tuple[str, Callable]]:
    """Every kernel with each way to z = u c, where z - max could become u c - max, rounded once."""
    row, target = torch.zeros(16), torch.zeros(16, dtype=torch.int64)
    up, saved = Upstream(row, row), Saved(row, row, row)
    logits, outputs = torch.empty(1, 16, VOCAB), ("logprob", "entropy", "logit_skew")
    hidden, weight = torch.empty(16, 64).bfloat16(), torch.empty(VOCAB, 64).bfloat16()
    narrow = logits.view(torch.bfloat16)[..., :VOCAB]
    for name, options in SCALES.items():
        s = RowSpec(target=target, valid_vocab=VOCAB, **options)
        yield f"stats-{name}", lambda s=s: backend.stats(logits, s, outputs)
        yield f"grad-{name}", lambda s=s: backend.grad(logits, s, saved, up, logits)
        yield f"loss-{name}", lambda s=s: backend.loss(logits, s, up, outputs, logits)
        yield f"narrow-{name}", lambda s=s: backend.loss(logits, s, up, outputs, narrow)
        yield f"linear-{name}", lambda s=s: products_of(arch, hidden, weight, s, outputs)
    yield from controls()


@contextmanager
def only_ptx() -> Iterator[None]:
    """What comes after it is left out, and what is made is kept apart from whole kernels."""

    def hook(*compilation):
        if not compilation:
            return "ptx", "ptx"  # by which it is told from the whole
        compilation[1]["cubin"] = lambda ptx, metadata: b""

    with knobs.runtime.scope(), knobs.cache.scope():
        knobs.runtime.add_stages_inspection_hook = hook
        knobs.cache.dir = str(Path(knobs.cache.dir) / "only-ptx")
        yield


def fusing() -> dict[str, list[str]]:
    """What `fused_differences` finds where the compiler may fuse: the check checked."""
    with patch.dict(launch.UNFUSED, enable_fp_fusion=True):
        return {
            name: fused_differences(compiled(call)[0])
            for name, call in scaled(driver.active.get_current_device())
            if name.endswith("-temperature")
        }


def fused_differences(kernel) -> list[str]:
    """The fused multiply-adds a b - c: a rounding of a b would be lost that c, the maximum, has."""
    ptx = kernel.asm["ptx"]
    negated = set(re.findall(r"\bneg\.f\d+\s+(%\w+),", ptx))
    fused = re.findall(r"\bfma\.\S+\s+%\w+, [^,]+, [^,]+, (%\w+);", ptx)
    return sorted(negated.intersection(fused))


def compiled(call: Callable) -> list:
    """The kernels that `call` would launch."""
    kernels = []

    def capture(kernel, grid):
        return lambda *args, **kwargs: kernels.append(kernel.warmup(*args, grid=grid, **kwargs))

    with patch.object(KernelInterface, "__getitem__", capture):
        call()
    return kernels


def loops(ptx: str) -> str:
    """The lines of all loop bodies: from a label to a branch back to it."""
    lines = ptx.splitlines()
    starts = [re.match(r"(\$L\w+):", line) for line in lines]
    labels = {start[1]: i for i, start in enumerate(starts) if start}
    inside = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if branch and labels[branch[1]] < i:
            inside += lines[labels[branch[1]] : i]
    return "\n".join(inside)


def accesses(ttgir: str) -> list[str]:
    """What each loop does in order: L loads, B a barrier, S stores."""
    letters = {"tt.load": "L", "barrier": "B", "tt.store": "S"}
    loops = [re.findall(r"tt\.load|tt\.store|\bbarrier\b", loop) for loop in ttgir.split("scf.for")]
    return [re.sub(r"(.)\1+", r"\1", "".join(map(letters.get, loop))) for loop in loops[1:]]


def reductions(ttgir: str) -> list[str]:
    """Of what each reduction over the lanes takes: how many consecutive lanes a thread has, of how
    many threads a warp, of how many warps."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.M))
    return [order(layouts[name]) for name in re.findall(r"\}\) : \(tensor<\w+, (#\w+)>", ttgir)]


def order(layout: str) -> str:
    if "blocked" in layout:
        counts = re.findall(r"\w+ = \[(\d+)\]", layout)[:3]
    else:
        bases = re.findall(r"\w+ = \[((?:\[\d+\](?:, )?)*)\]", layout)[:3]
        ranks = [list(map(int, re.findall(r"\d+", basis))) for basis in bases]
        lanes = [lane for rank in ranks for lane in rank]
        assert lanes == [2**i for i in range(len(lanes))], layout
        counts = [2 ** len(rank) for rank in ranks]
    return " of ".join(map(str, counts))


def handover(ptx: str) -> str:
    """What a kernel whose programs share rows does in order: S stores, B a barrier, A the count of
    programs that are done, with release and acquire, L loads."""
    after = ptx[: ptx.index("atom.")].rindex("st.global")
    words = r"(st\.global|bar\.sync|ld\.global|atom\.global\.gpu\.acq_rel\.add)"
    letters = {"st": "S", "ba": "B", "ld": "L", "at": "A"}
    order = "".join(letters[word[:2]] for word in re.findall(words, ptx[after:]))
    return re.sub(r"(.)\1+", r"\1", order)


def dump(kernel, what: str) -> str:
    """What cuobjdump says of the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, what, cubin.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def cost(sass: str, name: str) -> list[float]:
    """Of the loop over a row: instructions an entry of a thread, bytes its loads and stores take
    (stores: 0 where there are none). Left out is what a step may skip: the join of parts of a row,
    once in four to sixteen steps some 45 instructions."""
    body = max(inner_loops(sass, skipped=False), key=len)
    size = {"float32": 4, "narrow": 4, "float64": 8}.get(name.split("-")[1], 2)
    entries = launch._LOAD_BYTES // size * (2 if "full" in name else 4)
    widths = {"U16": 2, "": 4, "64": 8, "128": 16}
    text = "\n".join(body)
    loads, stores = (re.findall(rf"{c}G\.E\.?(U16|64|128)?", text) for c in ("LD", "ST"))
    narrowest = [min(map(widths.get, found), default=0) for found in (loads, stores)]
    return [round(len(body) / entries, 2), *narrowest]


def step(sass: str, shared: int) -> list[int]:
    """Of the loop along D on tensor cores: instructions and products, and the shared memory."""
    bodies = inner_loops(sass)
    products = [sum("MMA" in i.split(".")[0].split()[0] for i in body) for body in bodies]
    found = [[len(body), n, shared] for body, n in zip(bodies, products) if n]
    return min(found, default=[])


def spilled(sass: str) -> int:
    """Loads and stores of the stack in inner loops. Some versions of Triton keep there, where
    registers are short, what is read once a tile."""
    return sum(bool(re.match(r"(LDL|STL)\b", i)) for body in inner_loops(sass) for i in body)


def report(kernel, name: str) -> dict:
    ptx = kernel.asm["ptx"]
    usage, sass = (dump(kernel, what) for what in ("-res-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    slow = r"\b(?:div|rem|rcp(?!\.approx\.ftz)|sqrt|mul\.lo\.s64|mad\.lo\.s64)\S*"
    return {
        "registers": int(registers),
        "stack": int(stack),
        "spilled": spilled(sass),
        "wide_loads": bool(
            re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|" + _COPIES, ptx)
        ),
        "bulk_copies": "cp.async.bulk.tensor" in ptx,
        "wide_offsets": bool(
            re.search(r"tt\.addptr.*, (?:i64|tensor<\S+xi64)", kernel.asm["ttgir"])
        ),
        "product": [name for name, word in PRODUCTS.items() if re.search(rf"\b{word}", ptx)],
        "shared": kernel.metadata.shared,
        "step": step(sass, kernel.metadata.shared) if name.startswith("linear") else [],
        "loop_exponentials": loops(ptx).count("ex2.approx"),
        "cost": None if name.startswith("linear") else cost(sass, name),
        "reductions": reductions(kernel.asm["ttgir"]),
        "handover": handover(ptx) if name.endswith("shared") else None,
        "accesses": accesses(kernel.asm["ttgir"]),
        "slow_in_loops": sorted(set(re.findall(slow, loops(ptx)))),
    }


class AMD(Target):
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("hip", "gfx942", 64)


def on_amd() -> dict:
    """Loads and stores of 16 bytes, and barriers."""
    driver.set_active(AMD(942))
    words = ("_load_dwordx4", "_store_dwordx4", "s_barrier")
    return {
        name: [kernel.asm["amdgcn"].count(word) for word in words]
        for name, call in calls(torch.bfloat16, False, ("logprob", "entropy"))
        for kernel in compiled(call)
    }


def main() -> None:
    found, fused = {}, {}
    for arch in ARCHITECTURES:
        driver.set_active(Target(arch))
        found[f"sm_{arch}"] = {
            name + "-finish" * i: report(kernel, name)
            for name, call in cases(arch)
            for i, kernel in enumerate(compiled(call))
        }
        with only_ptx():
            fused[f"sm_{arch}"] = {
                name + "-finish" * i: [kernel.metadata.enable_fp_fusion, fused_differences(kernel)]
                for name, call in scaled(arch)
                for i, kernel in enumerate(compiled(call))
            }
    with only_ptx():
        fuses = fusing()
    print(json.dumps({"kernels": found, "fused": fused, "fusing": fuses, "amd": on_amd()}))
    if "--write" in sys.argv:
        table = {
            "registers, stack bytes": lambda r: [r["registers"], r["stack"]],
            "instructions an entry, bytes a load, a store": lambda r: r["cost"],
            "instructions, products of a step along D, shared bytes": lambda r: r["step"],
        }
        for title, row in table.items():
            table[title] = {
                arch: {name: row(r) for name, r in kernels.items() if row(r)}
                for arch, kernels in found.items()
            }
        text = json.dumps({"triton": triton.__version__, **table}, indent=1)
        text = re.sub(r"\[\s+|\s+\]|(?<=\d,)\s+(?=\d)", lambda m: m[0].strip() or " ", text)
        TABLE.write_text(text + "\n")


if __name__ == "__main__":
    main()
