"""Compiles csrc/cuda: .cu by nvcc, .cpp by the C++ compiler. No torch and no GPU is needed.

    python cuda_build.py cases      build/cuda/cases: tests/cuda_cases.cpp, linked with the kernels

What it looks at in the environment: CUDA_HOME, CXX, MAX_JOBS, and TORCH_CUDA_ARCH_LIST in torch's
syntax ("8.0;9.0+PTX", "Hopper"). Objects are kept in build/cuda and are compiled anew where a
source, a header or the command has changed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc/cuda"
OBJECTS = ROOT / "build/cuda"
CASES = ROOT / "tests/cuda_cases.cpp"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
LEAST = (8, 0)
NAMED = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}
ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?")
HOST_FLAGS = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0"]
NVCC_FLAGS = [
    *("-O3", "-std=c++17", "--expt-relaxed-constexpr"),
    "-fmad=false",  # kernels of different outputs must round alike; they fuse by hand
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
]


class CudaBuildError(Exception):
    """Why the CUDA part cannot be built."""


class Toolkit(NamedTuple):
    nvcc: str
    home: Path
    version: str

    @classmethod
    def find(cls) -> Toolkit:
        """By CUDA_HOME, on PATH, or as /usr/local/cuda*."""
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        if home:
            places = [Path(home) / "bin/nvcc"]
        else:
            installed = sorted(Path("/usr/local").glob("cuda-*"), key=_numbers, reverse=True)
            on_path = shutil.which("nvcc")
            places = [Path(on_path)] if on_path else []
            places += [place / "bin/nvcc" for place in (Path("/usr/local/cuda"), *installed)]
        for nvcc in places:
            if nvcc.is_file():
                return cls.of(str(nvcc))
        where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda*"
        raise CudaBuildError(f"no nvcc {where}; install the CUDA toolkit or set CUDA_HOME")

    @classmethod
    def of(cls, nvcc: str) -> Toolkit:
        """Its folder by its own account: what is on PATH may be a script."""
        steps = _output([nvcc, "--dryrun", "-x", "cu", os.devnull])
        release = re.search(r"release [\d.]+, V([\d.]+)", _output([nvcc, "--version"]))
        top = re.search(r"^#\$ TOP=(.*)$", steps, re.M)
        if release is None or top is None:
            raise CudaBuildError(f"{nvcc} does not answer as nvcc does")
        return cls(nvcc, Path(top[1].strip()).resolve(), release[1])


class Architectures(NamedTuple):
    machine: tuple[str, ...]  # what machine code is made for, such as "80" or "90a"
    portable: tuple[str, ...]  # what PTX is kept for

    @classmethod
    def wanted(cls, known: set[str]) -> Architectures:
        """TORCH_CUDA_ARCH_LIST or the default, as far as this nvcc knows them and the kernels run.

        Where the default's newest, the one kept as PTX, is not known, the newest that is takes it.
        """
        given = os.environ.get("TORCH_CUDA_ARCH_LIST")
        machine, portable = parse_architectures(given or DEFAULT_ARCHITECTURES)
        kept = tuple(name for name in machine if _number(name) in known)
        newest = max(known, key=int, default="nothing")
        if not kept:
            raise CudaBuildError(
                f"this nvcc knows none of {', '.join(machine)}, and nothing newer than {newest}; "
                "install a newer CUDA toolkit, or ask for less in TORCH_CUDA_ARCH_LIST"
            )
        if given and len(kept) < len(machine):
            unknown = ", ".join(f"sm_{name}" for name in machine if name not in kept)
            print(
                f"cuda_build: WARNING: TORCH_CUDA_ARCH_LIST={given!r}: this nvcc does not know "
                f"{unknown}, which is left out; it knows nothing newer than {newest}",
                file=sys.stderr,
            )
        ptx = tuple(name for name in portable if _number(name) in known)
        return cls(kept, ptx or (() if given else kept[-1:]))

    def flags(self) -> list[str]:
        flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in self.machine]
        return flags + [f"-gencode=arch=compute_{x},code=compute_{x}" for x in self.portable]

    def __str__(self) -> str:
        names = [f"sm_{name}" for name in self.machine]
        return " ".join(names + [f"compute_{name}" for name in self.portable])


def parse_architectures(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(machine, portable) of torch's syntax; below 8.0, where the kernels do not run, left out."""
    machine, portable = [], []
    for word in re.split(r"[;,\s]+", text.strip()):
        name, plus, _ = word.partition("+PTX")
        for part in (f"{each}{plus}" for each in NAMED.get(name, name).split(";")):
            found = ARCHITECTURE.fullmatch(part)
            if found is None:
                raise CudaBuildError(f"TORCH_CUDA_ARCH_LIST={text!r}: {word!r} is not understood")
            if (int(found[1]), int(found[2])) >= LEAST:
                machine.append(found[1] + found[2] + found[3])
                portable += machine[-1:] if found[4] else []
    if not machine:
        raise CudaBuildError(f"TORCH_CUDA_ARCH_LIST={text!r} names nothing of 8.0 or newer")
    return tuple(dict.fromkeys(machine)), tuple(dict.fromkeys(portable))


class Plan(NamedTuple):
    """The tools and the flags of one build."""

    toolkit: Toolkit
    architectures: Architectures
    jobs: int

    @classmethod
    def make(cls) -> Plan:
        if os.name == "nt":
            raise CudaBuildError("it is not supported on Windows")
        toolkit = Toolkit.find()
        known = set(re.findall(r"compute_(\d+)", _output([toolkit.nvcc, "--list-gpu-arch"])))
        return cls(toolkit, Architectures.wanted(known), _jobs())

    def command(self, source: Path) -> list[str]:
        """Compiles `source`, without its output."""
        if source.suffix == ".cu":
            return [*self.nvcc(), *NVCC_FLAGS, *self.architectures.flags(), *self.threads(), "-c"]
        about = {"EM_CUDA_ARCHITECTURES": self.architectures, "EM_NVCC": self.toolkit.version}
        defines = [f'-D{name}="{value}"' for name, value in about.items()]
        folders = [self.toolkit.home / "include", sysconfig.get_path("include"), _pybind11()]
        return [*_compiler(), *HOST_FLAGS, *defines, *(f"-I{folder}" for folder in folders), "-c"]

    def nvcc(self) -> list[str]:
        """nvcc finds gcc on PATH; CXX, where it is one word, says which."""
        compiler = os.environ.get("CXX", "").split()
        return [self.toolkit.nvcc, *(["-ccbin", *compiler] if len(compiler) == 1 else [])]

    def threads(self) -> list[str]:
        """Cores that are not needed for other files compile one file's architectures."""
        files = len(list(SOURCES.glob("*.cu")))
        return ["--threads", str(max(1, self.jobs // max(1, files)))]

    def link(self, objects: list[Path], target: Path) -> list[str]:
        """nvcc links; CUDA's runtime is part of the result, and stays hidden in it."""
        shared = [] if target.suffix == "" else ["-shared"]
        folders = [self.toolkit.home / name for name in ("lib64", "lib")]
        flags = ["-cudart=static", "--no-device-link", "-Xlinker=--exclude-libs,ALL"]
        flags += [f"-L{folder}" for folder in folders if folder.is_dir()]
        return [*self.nvcc(), *shared, *flags, *map(str, objects), "-o", str(target)]


def build_module(target: Path) -> None:
    """The extension module, at `target`."""
    _build(Plan.make(), sources(), target)


def build_cases(target: Path = OBJECTS / "cases") -> None:
    """tests/cuda_cases.cpp with the kernels, as a program."""
    _build(
        Plan.make(), [CASES, *(path for path in sources() if path.name != "bindings.cpp")], target
    )


def sources() -> list[Path]:
    return sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])


def _build(plan: Plan, sources: list[Path], target: Path) -> None:
    folders = (SOURCES, ROOT / "csrc", CASES.parent)
    headers = [path for folder in folders for path in folder.glob("*.h")]
    changed = max((path.stat().st_mtime for path in headers), default=0)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    objects = {source: OBJECTS / f"{source.name}.o" for source in sources}
    stale = [
        source
        for source, result in objects.items()
        if not _is_done(result, plan.command(source), max(changed, source.stat().st_mtime))
    ]
    stale.sort(key=lambda source: source.suffix != ".cu")  # the longest first
    with ThreadPoolExecutor(plan.jobs) as pool:
        list(pool.map(lambda source: _compile(plan, source, objects[source]), stale))
    _run(plan.link(list(objects.values()), target), target.name)


def _is_done(result: Path, command: list[str], changed: float) -> bool:
    record = _record(result)
    if not result.exists() or not record.exists() or result.stat().st_mtime < changed:
        return False
    return record.read_text() == "\n".join(command)


def _record(result: Path) -> Path:
    """The file that keeps the command an object was made by."""
    return result.with_suffix(".command")


def _compile(plan: Plan, source: Path, result: Path) -> None:
    command = plan.command(source)
    _record(result).unlink(missing_ok=True)
    _run([*command, str(source), "-o", str(result)], str(source.relative_to(ROOT)))
    _record(result).write_text("\n".join(command))


def _run(command: list[str], what: str) -> None:
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).strip()
    print(f"{Path(command[0]).name} {what}: {time.monotonic() - start:.0f} s", flush=True)
    if said:
        print(said, file=sys.stderr, flush=True)
    if done.returncode:
        problem = next((x for x in said.splitlines() if "error" in x), said.partition("\n")[0])
        raise CudaBuildError(f"{command[0]} failed on {what}: {problem}")


def _output(command: list[str]) -> str:
    """What it prints; it may fail."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr


def _compiler() -> list[str]:
    given = os.environ.get("CXX", "").split()
    found = given or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not found:
        raise CudaBuildError("no C++ compiler on PATH; install one or set CXX")
    return found


def _pybind11() -> Path:
    """Its headers: the package's own, or those that come with torch."""
    for package in ("pybind11", "torch"):
        found = importlib.util.find_spec(package)
        folder = Path(found.origin).parent / "include" if found and found.origin else None
        if folder is not None and (folder / "pybind11/pybind11.h").exists():
            return folder
    raise CudaBuildError("pybind11 has no headers here; pip install pybind11")


def _jobs() -> int:
    given = os.environ.get("MAX_JOBS", "").strip()
    if given and not (given.isdecimal() and int(given)):
        raise CudaBuildError(f"MAX_JOBS must be a number of processes, got {given!r}; unset it")
    return int(given or os.cpu_count() or 1)


def _number(name: str) -> str:
    return name.rstrip("af")


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


if __name__ == "__main__":
    if sys.argv[1:] != ["cases"]:
        sys.exit(__doc__)
    try:
        build_cases()
    except CudaBuildError as reason:
        sys.exit(f"cuda_build: {reason}")
