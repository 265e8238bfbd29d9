"""math-verify in a process of its own, which can be ended: its limit holds in every thread.

The process is started when it is first needed (importing sympy takes a second or two, which no
answer's limit pays for) and ended with the program. It serves each thread that asks in a fork of
its own, see `judge_worker`. A process forked from the program starts its own.
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

THREADS = 8
"""How many answers are compared at once at most; further threads wait."""
START_SECONDS, GRACE_SECONDS = 120, 2  # for it to start; for it to end an answer by itself
MEMORY_BYTES = 4 * 1024**3
"""Address space of a process; an answer that needs more is wrong."""
_WORKER = Path(__file__).with_name("worker.py")


def equal(given: str, right: str, seconds: float) -> bool:
    """Whether math-verify finds the two equal; False where it takes longer, or fails.

    Raises:
        RuntimeError: the process cannot be started.
    """
    return _pool.equal(given, right, seconds)


class _Line:
    """A socket with a process at its other end; JSON lines go both ways."""

    def __init__(self):
        self.socket, self.theirs = socket.socketpair()
        self.received = b""

    def ask(self, value, seconds: float):
        """The reply. OSError: the process has ended, or took too long."""
        deadline = time.monotonic() + seconds
        self.socket.settimeout(seconds)
        self.socket.sendall(json.dumps(value).encode() + b"\n")
        while not self.received.endswith(b"\n"):
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            more = self.socket.recv(65536)
            if not more:
                raise ConnectionError("the process has ended")
            self.received += more
        reply, self.received = self.received, b""
        return json.loads(reply)

    def is_quiet(self) -> bool:
        """Nothing is there to be read, not even an end: the process waits."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def close(self) -> None:
        self.socket.close()
        self.theirs.close()


class _Server:
    """The process, and the line that it takes further lines from."""

    def __init__(self):
        self.line = _Line()
        self.process = None
        command = [sys.executable or "python", "-I", str(_WORKER)]
        settings = {"path": [str(folder) for folder in sys.path], "bytes": MEMORY_BYTES}
        try:
            self.process = subprocess.Popen(
                command,
                stdin=self.line.theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self.line.theirs.close()
            reply = self.line.ask(settings, START_SECONDS)
        except OSError as error:
            reply = error
        except BaseException:
            self.end()
            raise
        if reply != "ready":
            self.end()
            raise RuntimeError(
                f"math-verify's process cannot be started ({reply}); check that "
                f"`{command[0]} -c 'import math_verify'` works, or use the judge 'exact'"
            )

    def serve(self, line: _Line) -> None:
        """OSError: the process has ended."""
        socket.send_fds(self.line.socket, [b"+"], [line.theirs.fileno()])
        line.theirs.close()

    def end(self) -> None:
        self.line.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class _Pool:
    """The process, the lines to it, and those of them that nobody waits at."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.starting = threading.Lock()
        self.free = threading.BoundedSemaphore(THREADS)
        self.server: _Server | None = None
        self.lines: set[_Line] = set()
        self.idle: list[_Line] = []

    def equal(self, given: str, right: str, seconds: float) -> bool:
        with self.free:
            line = self._take()
            try:
                verdict = line.ask([given, right, seconds], seconds + GRACE_SECONDS)
            except OSError:
                self._close(line)
                return False
            except BaseException:  # as Ctrl-C: the reply may still be to come
                self._close(line)
                raise
            self.idle.append(line)
            return verdict

    def _take(self) -> _Line:
        with contextlib.suppress(IndexError):
            while True:
                line = self.idle.pop()
                if line.is_quiet():
                    return line
                self._close(line)
        line = _Line()
        self.lines.add(line)
        try:
            with self.starting:
                self._serve(line)
        except BaseException:
            self._close(line)
            raise
        return line

    def _serve(self, line: _Line) -> None:
        if self.server is not None:
            try:
                return self.server.serve(line)
            except OSError:
                self.server.end()
                self.server = None
        self.server = _Server()
        self.server.serve(line)

    def _close(self, line: _Line) -> None:
        self.lines.discard(line)
        line.close()

    def end(self) -> None:
        for line in list(self.lines):
            self._close(line)
        self.idle.clear()
        if self.server is not None:
            self.server.end()
            self.server = None

    def forget(self) -> None:
        """In a forked process, which has its own worker: this is the parent's."""
        for line in self.lines:
            line.close()
        if self.server is not None:
            self.server.line.close()
            self.server.process.returncode = 0  # there is nothing to wait for
        self._begin()


_pool = _Pool()
atexit.register(lambda: _pool.end())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _pool.forget())
