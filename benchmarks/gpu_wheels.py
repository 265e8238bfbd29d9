"""The peers as wheels, for a GPU machine that has no network.

    make gpu-wheels                     or: python -m benchmarks.gpu_wheels --python 3.12
    python -m benchmarks.gpu_wheels --unpack build/peers         what `make gpu` does with them

A peer comes with what its operators import beyond torch, triton, transformers, numpy and packaging,
which the GPU machine must have; nothing else that it asks for is taken, torch least of all. One
that would make the folder larger than --mib is left out, and the folder says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FOLDER, UNPACKED = ROOT / ".whl", ROOT / "build/peers"
LEFT_OUT = "left_out.json"
PLATFORMS = (
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
)


class Peer(NamedTuple):
    module: str  # what is imported of it
    packages: tuple[str, ...]  # its wheel, and those of what its operators import


PEERS = {
    "trl": Peer("trl", ("trl",)),
    "liger-kernel": Peer("liger_kernel", ("liger-kernel",)),
    "verl": Peer("verl", ("verl", "tensordict", "cloudpickle", "pyvers")),
    # Liger's kernel for Hopper. Its compiler alone is some 90 MB.
    "nvidia-cutlass-dsl": Peer(
        "cutlass",
        (
            *(
                f"nvidia-cutlass-dsl{part}"
                for part in ("", "-libs-base", "-libs-core", "-libs-cu13")
            ),
            *("cuda-python", "cuda-bindings", "cuda-pathfinder", "protobuf"),
        ),
    ),
}


def download_command(packages: tuple[str, ...], python: str, folder: Path) -> list[str]:
    """For CPython of that version on x86-64 Linux, whatever runs this."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    command += [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    return [*command, "-c", str(ROOT / "constraints.txt"), *packages]


def prepare(folder: Path, python: str, most: float) -> dict[str, str]:
    """Put the wheels in `folder`, in place of those there; return peer -> why it is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.whl"), folder / LEFT_OUT):
        old.unlink(missing_ok=True)
    left_out = {}
    for name, peer in PEERS.items():
        with tempfile.TemporaryDirectory() as place:
            done = subprocess.run(
                download_command(peer.packages, python, Path(place)), capture_output=True, text=True
            )
            wheels = sorted(Path(place).glob("*.whl"))
            if done.returncode:
                left_out[name] = last_error(done)
            elif mebibytes(wheels) + mebibytes(folder.iterdir()) > most:
                left_out[name] = f"{mebibytes(wheels):.1f} MiB would make it more than {most:g} MiB"
            else:
                for wheel in wheels:
                    shutil.move(wheel, folder / wheel.name)
    (folder / LEFT_OUT).write_text(json.dumps(left_out) + "\n")
    return left_out


def last_error(done: subprocess.CompletedProcess) -> str:
    """The last that says something: pip ends with a link where versions do not go together."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    lines = [line for line in lines if "for help visit" not in line]
    return (lines or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def mebibytes(files) -> float:
    return sum(file.stat().st_size for file in files) / 2**20


def unpack(folder: Path, target: Path) -> tuple[list[str], dict[str, str]]:
    """(the wheels that are now in `target`, peer or wheel -> why it is not there)."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    found, left_out = [], {}
    for wheel in sorted(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--disable-pip-version-check", "--target", str(target), str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            left_out[wheel.name] = last_error(done)
        else:
            found.append(wheel.name)
    for stray in ("tests", "scripts", "bin"):  # some wheels bring their own
        shutil.rmtree(target / stray, ignore_errors=True)
    return found, {**left_out, **absent(folder, target)}


def absent(folder: Path, target: Path) -> dict[str, str]:
    """The peers that are neither in `target` nor installed -> why."""
    try:
        said = json.loads((folder / LEFT_OUT).read_text())
    except (OSError, ValueError):
        said = {}
    return {
        name: said.get(name, f"it is not installed, and {folder.name}/ has no wheel of it")
        for name, peer in PEERS.items()
        if not (target / peer.module).exists() and importlib.util.find_spec(peer.module) is None
    }


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 1 where wheels were to be made and there is none."""
    options, code = parse(arguments), 0
    if options.unpack is not None:
        found, left_out = unpack(options.folder, options.unpack)
        print(*(f"{name} is unpacked" for name in found), sep="\n")
    else:
        left_out = prepare(options.folder, options.python, options.mib)
        wheels = sorted(options.folder.glob("*.whl"))
        for wheel in wheels:
            print(f"{mebibytes([wheel]):6.1f} MiB  {wheel.name}")
        print(f"{mebibytes(wheels):6.1f} MiB  in all, in {options.folder}")
        code = 0 if wheels else 1
    for name, reason in left_out.items():
        print(f"{name} is left out: {reason}")
    return code


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu_wheels", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--python", default="3.12", help="of the GPU machine (%(default)s)")
    parser.add_argument("--mib", type=float, default=64, help="at most, in all (%(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the wheels (.whl)")
    parser.add_argument(
        "--unpack", type=Path, metavar="FOLDER", help="make none, unpack them there, emptied first"
    )
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"3\.\d+", options.python):
        parser.error(f"--python must be a version such as 3.12, got {options.python!r}")
    return options


if __name__ == "__main__":
    sys.exit(main())
