"""One process at a time in a folder: a file in it says which one, and is gone when it is done.

A process that is killed leaves the file. The next one sees that nobody is behind it, by the number
and the time of start of the process, says so and takes the folder over.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from em_kernels.lm.text import check_can_be_folder

LOCK = ".lock"
_HELD: set[tuple[int, str]] = set()  # (process, file): a fork has the parent's, and its own number


class InUseError(RuntimeError):
    """Another process works in the folder."""


@dataclass(frozen=True)
class Holder:
    """Who has a folder.

    Args:
        doing: what, in words.
        host, machine, boot, space: the name of the machine, what its installation and its start
            are called by, and the process namespace: where the number of a process counts.
        pid, started: the process, and when it began, so that another of the same number is told
            apart.
        since: local time.
    """

    doing: str
    host: str
    machine: str
    boot: str
    space: str
    pid: int
    started: str
    since: str

    @classmethod
    def now(cls, doing: str) -> Holder:
        space = ""
        with suppress(OSError):
            space = os.readlink("/proc/self/ns/pid")
        return cls(
            doing,
            socket.gethostname(),
            _text("/etc/machine-id"),
            _text("/proc/sys/kernel/random/boot_id"),
            space,
            os.getpid(),
            started(os.getpid()) or "",
            datetime.now().isoformat(" ", "seconds"),
        )

    def __str__(self) -> str:
        return f"{self.doing}, process {self.pid} on {self.host}, since {self.since}"

    def is_beside(self, own: Holder) -> bool:
        """Whether `own` can see the processes where this one is."""
        return (self.host, self.boot, self.space) == (own.host, own.boot, own.space)

    def is_gone(self, own: Holder) -> bool:
        """Whether it is sure that nobody is behind it; of another machine it never is."""
        if self.is_beside(own):
            return started(self.pid) != self.started
        restarted = (self.host, self.machine) == (own.host, own.machine) and self.boot != own.boot
        return restarted and bool(own.machine and self.boot and own.boot)


@contextmanager
def held(folder: str | Path, doing: str, name: str = LOCK) -> Iterator[None]:
    """Have the folder to oneself in the block; it is made, and goes again where nothing is in it.

    Args:
        doing: what this process does there, for the message that another one gets.
        name: of the file; what may be done at the same time has different ones.

    Raises:
        InUseError: another process has it, or this one already; says which, and what to do.
        OSError: the file cannot be written.
    """
    folder = Path(folder)
    check_can_be_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / name
        own = Holder.now(doing)
        _take(path, folder, own)
    except BaseException:
        _remove_empty(made)
        raise
    key = (own.pid, str(path))
    _HELD.add(key)
    try:
        yield
    finally:
        _HELD.discard(key)
        if os.getpid() == own.pid:  # not what was forked in the block
            with suppress(OSError):  # a folder that is read-only by now: the next one sees
                _give_back(path, own)
            _remove_empty(made)


def _take(path: Path, folder: Path, own: Holder) -> None:
    with _opened(path) as file:
        found = _read(file)
        if found is not None:
            _check_gone(found, path, folder, own)
        text = json.dumps(asdict(own)) + "\n"
        os.ftruncate(file, 0)
        os.pwrite(file, text.encode(), 0)
        os.fsync(file)


def _check_gone(found: Holder, path: Path, folder: Path, own: Holder) -> None:
    """Raise an InUseError unless nobody is behind the file; say that it is taken over."""
    itself = found.is_beside(own) and (found.pid, found.started) == (own.pid, own.started)
    if itself and (own.pid, str(path)) not in _HELD:
        return
    if itself or not found.is_gone(own):
        remedy = "wait until it is done, or choose another folder"
        if not found.is_beside(own):
            remedy += (
                f"; from here it cannot be seen whether that process still runs: if it does not, "
                f"remove {folder / path.name}"
            )
        raise InUseError(f"{folder} is in use ({found}): {remedy}")
    warnings.warn(
        f"{folder} was left by {found}, which has ended without a word: taken over", stacklevel=6
    )


def _give_back(path: Path, own: Holder) -> None:
    with _opened(path) as file:
        if _read(file) == own:
            path.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The file, for one process at a time, where the system can do that."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _wait_for(file)
            if _is_still(path, file):
                yield file
                return
        finally:
            os.close(file)


def _is_still(path: Path, file: int) -> bool:
    """Whether the file is the one of that name, and not one that was removed meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _wait_for(file: int) -> None:
    with suppress(ImportError, OSError):  # not every system, and not every file system, has it
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


def _read(file: int) -> Holder | None:
    """Nobody where the file does not say: one that is killed while it writes has nothing yet."""
    try:
        found = json.loads(os.pread(file, 65536, 0).decode())
        holder = Holder(**{item.name: found[item.name] for item in fields(Holder)})
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return holder if isinstance(holder.pid, int) else None


def started(pid: int) -> str | None:
    """When a process began, by its own clock; None where there is none, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None if Path("/proc/self/stat").exists() else _started_by_ps(pid)
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]


def _started_by_ps(pid: int) -> str | None:
    """Where there is no /proc, as on macOS."""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # nothing can be known: a process is never taken for one that is gone
        return ""
    return " ".join(found.split()) or None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _remove_empty(made: list[Path]) -> None:
    """The folders that were made, the innermost first, as far as nothing is in them."""
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return
