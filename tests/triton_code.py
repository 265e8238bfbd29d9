"""What the code of a compiled Triton kernel says of it.

A loop without a division or a 64-bit product, loads of 16 bytes, and differences that were made
part of a fused multiply-add, are read off the PTX; registers, stack (where spills go) and what the
loop over a row issues off the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton
from sass import inner_loops

from em_kernels.backends.triton import launch

PRODUCTS = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}
_COPIES = r"cp\.async\.cg\S* .*, 0x10,"  # 16 bytes to shared memory
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def fused_differences(kernel) -> list[str]:
    """The fused multiply-adds a b - c: a rounding of a b would be lost that c, the maximum, has."""
    ptx = kernel.asm["ptx"]
    negated = set(re.findall(r"\bneg\.f\d+\s+(%\w+),", ptx))
    fused = re.findall(r"\bfma\.\S+\s+%\w+, [^,]+, [^,]+, (%\w+);", ptx)
    return sorted(negated.intersection(fused))


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
