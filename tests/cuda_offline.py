"""What the compiled CUDA kernels use, read off the built module; no GPU is needed.

    python tests/cuda_offline.py            prints the report as JSON
    python tests/cuda_offline.py --write    also renews tests/cuda_resources.json

Registers, stack, local memory (where spills go) and static shared memory are what the compiler
recorded; from sm_90 on 1024 bytes of shared memory are the system's own. 16-byte accesses, loads
that take no place in L1, bulk copies, fences of the device and what the loops over whole chunks
issue are seen in the machine code; 64-bit offsets and what leaves L2 first in the PTX.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sass import inner_loops

TABLE = Path(__file__).with_name("cuda_resources.json")
# Those of the table, under its titles.
TABLES = {
    "registers, stack, local, shared": ("registers", "stack", "local", "shared"),
    "fences of the device, instructions a number": ("fences", "a_number"),
    "instructions, loads, stores of a chunk": ("loop_instructions", "loop_loads", "loop_stores"),
}
LOADS = 4  # of 16 bytes in a chunk of a thread: kLoads of csrc/cuda/sizes.h
USAGE = re.compile(r"^ Function (\S+):\n +REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.M)
# Instructions of the machine code that are counted.
CODE = {
    "wide_loads": r"LDG\.E\S*\.(?:128|256)\b",
    "passing_loads": r"LDG\.E\.NA\.128\b",
    "wide_stores": r"STG\.E\S*\.(?:128|256)\b",
    "wide_shared_loads": r"LDS\.128\b",
    "bulk_copies": r"UBLKCP\b",
    "cluster_barriers": r"UCGABAR_ARV\b",
    "fences": r"MEMBAR\.\w+\.GPU\b",
}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)


def module_file() -> Path | None:
    """The built em_kernels._cuda, which need not be importable."""
    found = importlib.util.find_spec("em_kernels._cuda")
    return Path(found.origin) if found and found.origin else None


def cuobjdump() -> str | None:
    """nvcc's own, the one on PATH, or triton's."""
    places = [Path(nvcc).resolve().parent / "cuobjdump" for nvcc in [shutil.which("nvcc")] if nvcc]
    places += [Path("/usr/local/cuda/bin/cuobjdump"), Path(shutil.which("cuobjdump") or "/none")]
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next((str(place) for place in places if place.is_file()), None)


def report(module: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> what the TABLES hold and the counts of CODE."""
    tool = cuobjdump()
    usage, code = (_run(tool, flag, str(module)) for flag in ("--dump-resource-usage", "-sass"))
    found: dict[str, dict] = {}
    for arch, text in _by_architecture(usage):
        for name, *numbers in USAGE.findall(text):
            registers, stack, shared, local = map(int, numbers)
            kernel = found.setdefault(arch, {}).setdefault(name, {})
            kernel.update(registers=registers, stack=stack, local=local, shared=shared)
    for arch, text in _by_architecture(code):
        for body in text.split("Function : ")[1:]:
            name, _, lines = body.partition("\n")
            found[arch][name].update(_count(lines))
            loop = ("loop_instructions", "loop_loads", "loop_stores")
            found[arch][name].update(zip(loop, first_loop(lines) or ()))
    short = short_names(sorted({name for kernels in found.values() for name in kernels}))
    for kernels in found.values():
        for name, kernel in kernels.items():
            if chunk := kernel.pop("chunk"):
                kernel["a_number"] = round(chunk / _numbers(short[name]), 2)
    return {
        arch: {short[name]: kernels[name] for name in sorted(kernels, key=short.get)}
        for arch, kernels in sorted(found.items(), key=lambda each: int(each[0][3:].rstrip("af")))
    }


def wide_products(module: Path) -> dict[str, int]:
    """Kernel -> products of 64-bit integers in its PTX; empty where the module holds no PTX.

    Where a row begins takes three: row % inner, and each of the two indices times its stride.
    """
    return in_ptx(module, r"\b(?:mul|mad)\.lo\.s64\b")


def last_loads(module: Path) -> dict[str, int]:
    """Kernel -> 16-byte loads whose line is the first to leave L2; empty as `wide_products`."""
    return in_ptx(module, r"\bld\.global\.L1::no_allocate\.L2::cache_hint\.v4\.u32\b")


def in_ptx(module: Path, pattern: str) -> dict[str, int]:
    parts = re.split(
        r"^\.visible \.entry (\w+)\(", _run(cuobjdump(), "-ptx", str(module)), flags=re.M
    )
    names, bodies = parts[1::2], parts[2::2]
    short = short_names(names) if names else {}
    return {short[name]: len(re.findall(pattern, body)) for name, body in zip(names, bodies)}


def short_names(symbols: list[str]) -> dict[str, str]:
    """Symbol -> "stats<float, true>": demangled, without namespaces, return type and parameters."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True
    ).stdout
    names = [_short(line) for line in text.splitlines()]
    if len(set(names)) != len(symbols):
        raise ValueError(f"short names must tell kernels apart, got {names}")
    return dict(zip(symbols, names, strict=True))


def _short(name: str) -> str:
    """Parameters begin at the first parenthesis outside of angle brackets and after a name."""
    name = re.sub(r"\(anonymous namespace\)::|em_kernels::|cuda::", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"^void ", "", name)


def _count(code: str) -> dict[str, int]:
    memory = re.findall(r"\b(?:LDG|STG|LDS|UBLKCP|UCGABAR|MEMBAR)[\w.]*", code)
    counts = {what: sum(bool(re.match(one, x)) for x in memory) for what, one in CODE.items()}
    return {
        **counts,
        "chunk": sum(map(len, filter(_is_of_a_chunk, inner_loops(code)))),
        "copies_with_a_policy": len(re.findall(r"UBLKCP\b.*\bdesc\[", code)),
    }


def _is_of_a_chunk(loop: list[str]) -> bool:
    """Whether a round takes a whole chunk of each thread's numbers, and looks at nothing else."""
    loads = re.findall(r"\bLD[GS]\b[\w.]*", "\n".join(loop))
    return len(loads) == LOADS and all(load.endswith("128") for load in loads)


def _numbers(kernel: str) -> int:
    """In a chunk of a thread."""
    size = 8 if "double" in kernel else 4 if "float" in kernel else 2
    return LOADS * 16 // size


def first_loop(code: str) -> tuple[int, int, int] | None:
    """Instructions, loads and stores of the shortest way around the first loop of exponentials.

    That is the loop over whole chunks, and every way around it has an exponential per number; the
    other ways are those of the first and the last vectors of a row.
    """
    lines = [(int(at, 16), when, name, rest) for at, when, name, rest in INSTRUCTION.findall(code)]
    index = {line[0]: i for i, line in enumerate(lines)}
    after = [_successors(lines, index, i) for i in range(len(lines))]
    for end, targets in enumerate(after):
        for begin in targets:
            exponentials = [i for i in range(begin, end) if lines[i][2] == "MUFU.EX2"]
            if begin <= end and len(exponentials) >= 8:
                return _shortest(lines, after, begin, end, exponentials)
    return None


def _successors(lines: list, index: dict[int, int], i: int) -> list[int]:
    _, when, name, rest = lines[i]
    found = []
    if name.startswith("BRA"):
        found = [index[at] for at in [int(rest.split()[-1], 16)] if at in index]
        if not when and not re.search(r"\bU?P\d", rest) and name == "BRA":
            return found
    if name.startswith(("EXIT", "RET")) and not when:
        return found
    return found + [i + 1] if i + 1 < len(lines) else found


def _shortest(lines, after, begin, end, exponentials) -> tuple[int, int, int]:
    """By dynamic programming from the last line back; ways back inside of the loop are left out."""
    best: dict[int, tuple] = {}
    for i in range(end, begin - 1, -1):
        ways = [best[j] for j in after[i] if i < j <= end and j in best] if i < end else [(0,) * 4]
        if not ways:
            continue
        name = lines[i][2]
        here = (-(i in exponentials), 1, _is(name, "LD"), _is(name, "ST"))
        best[i] = tuple(a + b for a, b in zip(here, min(ways)))
    return best[begin][1:]


def _is(name: str, kind: str) -> bool:
    return name.split(".")[0] in (kind, kind + "G", kind + "S")


def _by_architecture(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^arch = (sm_\w+)$", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def as_table(found: dict, columns: tuple[str, ...]) -> dict:
    return {
        arch: {
            name: [kernel[column] for column in columns]
            for name, kernel in kernels.items()
            if all(column in kernel for column in columns)
        }
        for arch, kernels in found.items()
    }


def write(found: dict) -> None:
    from em_kernels import _cuda

    tables = {title: as_table(found, columns) for title, columns in TABLES.items()}
    text = json.dumps({"nvcc": _cuda.nvcc, **tables}, indent=1)
    TABLE.write_text(
        re.sub(r"\[([\s\d.,]+)\]", lambda x: f"[{' '.join(x[1].split())}]", text) + "\n"
    )


if __name__ == "__main__":
    built = module_file()
    if built is None or cuobjdump() is None:
        sys.exit("em_kernels._cuda is not built, or there is no cuobjdump")
    result = report(built)
    print(json.dumps({**result, "products of 64 bits": wide_products(built)}, indent=1))
    if "--write" in sys.argv:
        write(result)
