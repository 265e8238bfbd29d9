"""The kernels of csrc/cpu under GCC's sanitizers: builds them, and runs their tests on the build.

    make sanitize                           all three
    make sanitize ARGS="thread"             one of address, undefined, thread
    make sanitize ARGS="address -- -k nan"  what follows -- goes to pytest, in place of the files

Each is built in a folder of its own, build/sanitize/<name>, with links to the Python files beside
it; the module in em_kernels/ is not touched. A first run of faults.cpp shows that faults are found.
Exit code 1 if a fault is found or a test fails, 2 where that cannot be told.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "sanitize"
KERNELS = tuple(
    f"tests/backends/test_{name}.py"
    for name in (
        *("cpu_kernels", "cpu_halves", "cpu_narrow", "cpu_units", "cpu_threads"),
        *("above", "divergence_kernels", "float16"),
    )
)
FAULT = 66  # the exit code of a process in which a fault was found


class Sanitizer(NamedTuple):
    """How a build is made and run.

    flags: of compiler and linker. libraries: loaded before all others. variable: of its options.
    options: FAULT on a fault, besides. sources: more than those of the module. variables: of the
    environment, besides. tests: files.
    """

    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    variable: str
    options: str
    sources: tuple[str, ...] = ()
    variables: Mapping[str, str] = {}
    tests: tuple[str, ...] = KERNELS

    def environment(self, report: Path) -> dict[str, str]:
        options = f"{self.options}:exitcode={FAULT}:log_path={report}"
        loaded = " ".join(file_of(name) for name in self.libraries)
        return {self.variable: options, "LD_PRELOAD": loaded, **self.variables}


SANITIZERS = {
    # Leaks: Python frees little at its end; tests/fuzz/test_memory.py counts them. libstdc++ comes
    # first so that exceptions find their handler.
    "address": Sanitizer(
        ("-fsanitize=address", "-fno-omit-frame-pointer"),
        ("libasan.so", "libstdc++.so.6"),
        "ASAN_OPTIONS",
        "detect_leaks=0:detect_stack_use_after_return=1",
    ),
    # vptr: asks for type information that torch's libraries do not export.
    "undefined": Sanitizer(
        (
            "-fsanitize=undefined,float-cast-overflow",
            "-fno-sanitize=vptr",
            "-fno-sanitize-recover=all",
        ),
        (),
        "UBSAN_OPTIONS",
        "print_stacktrace=1",
    ),
    # No suppressions: OpenMP is that of threads.cpp, and libgomp gives torch's own code one thread.
    "thread": Sanitizer(
        ("-fsanitize=thread",),
        ("libtsan.so",),
        "TSAN_OPTIONS",
        "halt_on_error=1",
        (str(HERE / "threads.cpp"),),
        {"OMP_THREAD_LIMIT": "1"},
        ("tests/backends/test_cpu_threads.py",),  # the others run one thread
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(SANITIZERS))
    given, pytest_arguments = _split(sys.argv[1:] if argv is None else list(argv))
    names = parser.parse_args(given).names or list(SANITIZERS)
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown:
        parser.error(f"NAME must be among {', '.join(SANITIZERS)}, got {unknown[0]!r}")
    if shutil.which("g++") is None:
        print("sanitize: there is no g++", file=sys.stderr)
        return 2
    return max(run(name, pytest_arguments) for name in names)


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def run(name: str, pytest_arguments: Sequence[str] = ()) -> int:
    started = time.monotonic()
    package = build(name)
    if package is None:
        print(f"{name}: not built", file=sys.stderr)
        return 2
    if (missed := missed_fault(name) or other_module(name)) is not None:
        print(f"{name}: {missed}", file=sys.stderr)
        return 2
    built = time.monotonic()
    wanted = pytest_arguments or SANITIZERS[name].tests
    done = _python(
        name,
        *("-m", "pytest", "-x", "-p", "no:cacheprovider", *wanted),
    )
    for report in reports(name):
        print(report.read_text(errors="replace"), file=sys.stderr)
    state = "clean" if done.returncode == 0 else f"FAILED, exit code {done.returncode}"
    spent = f"built in {built - started:.0f} s, tests {time.monotonic() - built:.0f} s"
    print(f"{name}: {state}; {spent}", flush=True)
    return int(done.returncode != 0)


def build(name: str) -> Path | None:
    """The package with the module of this build, in a folder of its own; None if there is none."""
    package = FOLDER / name / "em_kernels"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        if old.is_symlink() or old.suffix == ".so":
            old.unlink()
    command = [sys.executable, str(HERE / "build.py"), name]
    subprocess.run(command, check=False, cwd=ROOT, env={**os.environ, "CXX": "g++", "CC": "gcc"})
    for file in (ROOT / "em_kernels").iterdir():
        if file.suffix != ".so" and file.name not in ("_build.json", "__pycache__"):
            (package / file.name).symlink_to(file)
    return package if list(package.glob("_C*.so")) else None


def missed_fault(name: str) -> str | None:
    """What is wrong with the sanitizer itself: a fault of faults.cpp that it does not find."""
    sanitizer, library = SANITIZERS[name], FOLDER / name / "faults.so"
    command = ["g++", "-std=c++20", "-O0", "-g", "-shared", "-fPIC", "-fopenmp", *sanitizer.flags]
    command += [str(HERE / "faults.cpp"), "-o", str(library)]
    if sanitizer.sources:
        command[-2:-2] = [*sanitizer.sources, *torch_flags()]
    subprocess.run(command, check=True, cwd=ROOT)
    for fault, found in ((name, True), ("none", False)):
        call = f"import torch, ctypes, sys; sys.exit(bool(ctypes.CDLL({str(library)!r}).{fault}()))"
        done = _python(name, "-c", call)
        if (done.returncode == FAULT) != found:
            return f"{fault!r} of faults.cpp ended with exit code {done.returncode}"
    return None


def other_module(name: str) -> str | None:
    """What the tests would run on in place of the build."""
    call = f"import em_kernels._C as m, sys; sys.exit({str(FOLDER)!r} not in m.__file__)"
    return "the module of em_kernels/ was loaded" if _python(name, "-c", call).returncode else None


def torch_flags() -> list[str]:
    from torch.utils import cpp_extension

    libraries = cpp_extension.library_paths()
    flags = [f"-I{path}" for path in cpp_extension.include_paths()]
    return [*flags, *(f"-L{path}" for path in libraries), "-ltorch_cpu", "-lc10"]


def reports(name: str) -> list[Path]:
    """What was found: a process ends there, and pytest has not shown what it captured."""
    return sorted((FOLDER / name).glob("report.*"))


def _python(name: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Its package goes before that of the working folder, which is not put first."""
    for old in reports(name):
        old.unlink()
    path = os.pathsep.join(map(str, (FOLDER / name, ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": path}
    environment |= SANITIZERS[name].environment(FOLDER / name / "report")
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=False)


def file_of(library: str) -> str:
    """Where the compiler finds it."""
    command = ["g++", f"-print-file-name={library}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
