"""math-verify in processes of its own, which can be ended: its limits hold in every thread.

A process is started when it is first needed (importing sympy takes a second or two, which no
answer's limit pays for), kept for the next answer, and ended with the program. A process forked
from the program starts its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

PROCESSES = 4
"""How many answers are compared at once at most; further threads wait."""
START_SECONDS, GRACE_SECONDS = 120, 2  # for it to start; for it to end an answer by itself
MEMORY_BYTES = 4 * 1024**3
"""Address space of a process; an answer that needs more is wrong."""
_FAILED = "math-verify's process cannot be started"
_WORKER = Path(__file__).with_name("judge_worker.py")


def equal(given: str, right: str, seconds: float) -> bool:
    """Whether math-verify finds the two equal; False where it takes longer, or fails.

    Raises:
        RuntimeError: the process cannot be started.
    """
    return _pool.equal(given, right, seconds)


class _Process:
    """A worker, and the socket that it reads and writes."""

    def __init__(self, seconds: float):
        self.socket, theirs = socket.socketpair()
        self.seconds, self.ready, self.received = seconds, False, b""
        self.deadline = time.monotonic() + START_SECONDS
        with theirs:
            self.process = self._started(theirs)
        path = [str(folder) for folder in sys.path]
        self._send({"path": path, "seconds": seconds, "bytes": MEMORY_BYTES})

    def _started(self, theirs: socket.socket) -> subprocess.Popen:
        command = [sys.executable or "python", "-I", str(_WORKER)]
        try:
            return subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL)
        except OSError as error:
            self.socket.close()
            raise RuntimeError(f"{_FAILED} ({error}): {' '.join(command)}") from error

    def await_start(self) -> None:
        if self.ready:
            return
        try:
            reply = self._receive(self.deadline)
        except OSError as error:
            reply = f"it has ended, or hangs: {error}"
        if reply != "ready":
            raise RuntimeError(
                f"{_FAILED} ({reply}); check that `{sys.executable} -c 'import math_verify'` "
                "works, or use the judge 'exact'"
            )
        self.ready = True

    def equal(self, given: str, right: str) -> bool | None:
        """None where an answer took too long. OSError: the process has ended, or hangs."""
        self._send([given, right])
        return self._receive(time.monotonic() + self.seconds + GRACE_SECONDS)

    def _send(self, value) -> None:
        self.socket.settimeout(START_SECONDS)
        with contextlib.suppress(OSError):  # it has ended, which is seen when it should reply
            self.socket.sendall(json.dumps(value).encode() + b"\n")

    def _receive(self, deadline: float):
        while b"\n" not in self.received:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            more = self.socket.recv(65536)
            if not more:
                raise ConnectionError("no reply")
            self.received += more
        line, _, self.received = self.received.partition(b"\n")
        return json.loads(line)

    def end(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.wait()


class _Pool:
    """The workers, those of them that wait for an answer, and how many more there may be."""

    def __init__(self):
        self.free = threading.BoundedSemaphore(PROCESSES)
        self.idle: list[_Process] = []
        self.all: set[_Process] = set()

    def equal(self, given: str, right: str, seconds: float) -> bool:
        with self.free:
            process = self._take(seconds)
            try:
                process.await_start()
                verdict = process.equal(given, right)
            except OSError:
                self._end(process)
                return False
            except BaseException:  # as Ctrl-C: the reply may still be to come
                self._end(process)
                raise
            self.idle.append(process)
            return bool(verdict)

    def _take(self, seconds: float) -> _Process:
        with contextlib.suppress(IndexError):
            while True:
                process = self.idle.pop()
                if process.seconds == seconds and process.process.poll() is None:
                    return process
                self._end(process)
        process = _Process(seconds)
        self.all.add(process)
        return process

    def _end(self, process: _Process) -> None:
        self.all.discard(process)
        process.end()

    def end(self) -> None:
        for process in list(self.all):
            self._end(process)

    def forget(self) -> None:
        """In a forked process, which has its own workers: these are the parent's."""
        for process in self.all:
            process.socket.close()
            process.process.returncode = 0  # there is nothing to wait for
        self.__init__()


_pool = _Pool()
atexit.register(_pool.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget)
