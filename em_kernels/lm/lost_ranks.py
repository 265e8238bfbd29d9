"""That a rank which has ended is noticed by the others, with its reason, whatever they are doing.

Ranks wait for one another for hours, since one of them may be evaluating or writing a checkpoint;
NCCL waits as long for one that is gone. So each rank keeps a connection to the first, over which
nothing is said while all goes well. The system closes it when the process at its other end is
killed, and TCP asks for a machine that is silent. The first rank tells all others, and one that is
still waiting `GRACE` seconds later is ended, with the reason on stderr.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
import warnings
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

GRACE = 20.0  # seconds for a rank to end by itself, once it is known that another has
CONNECT = 20.0  # seconds to reach the first rank
SILENT = (15, 5, 3)  # keepalive: first question after so many seconds, then every so many, so often
LEFT, FAILED, LOST = "left", "failed", "lost"
ENDED = "it was killed, or its machine is gone"


class _Peer(NamedTuple):
    """A connection and the rank at its other end."""

    rank: int
    lines: socket.socket

    def tell(self, *words: object) -> None:
        with suppress(OSError):  # who has ended needs no word
            self.lines.sendall(" ".join(map(str, words)).replace("\n", " ").encode() + b"\n")


class Watch:
    """One rank's part in it, from the moment that all ranks make theirs to `leave`."""

    def __init__(self, rank: int, size: int):
        self.rank = rank
        self.reason: str | None = None
        self._known, self._left = threading.Event(), threading.Event()
        self._peers: list[_Peer] = []
        where = _meet(rank)
        try:
            self._open(where, size)
        except OSError as error:
            warnings.warn(
                f"rank {rank} cannot reach the first one at {where.host}:{where.port} ({error}): "
                "if one of them is killed, the other is not told",
                stacklevel=5,
            )

    def _open(self, where: _Meeting, size: int) -> None:
        if where.listener is None:
            self._peers = [_Peer(0, where.connect(self.rank))]
            work = self._listen
        else:
            listener = where.listener

            def work() -> None:
                self._peers = where.accept(listener, size - 1)
                self._listen()

        threading.Thread(target=work, name="em_kernels ranks", daemon=True).start()

    def leave(self, error: BaseException | None = None) -> None:
        """This rank is done, well or with an error, which the others are told."""
        self._left.set()
        for peer in list(self._peers):
            if error is None:
                peer.tell(LEFT)
            elif self.rank == 0:
                peer.tell(LOST, 0, _text(error))
            else:
                peer.tell(FAILED, _text(error))

    def why(self, seconds: float = 2.0) -> str | None:
        """Which rank has ended, and the reason, if that becomes known in time."""
        self._known.wait(seconds)
        return self.reason

    def _listen(self) -> None:
        """Until every connection is closed."""
        with selectors.DefaultSelector() as ready:
            for peer in self._peers:
                ready.register(peer.lines, selectors.EVENT_READ, peer)
            while ready.get_map():
                for key, _ in ready.select():
                    if self._hear(key.data):
                        ready.unregister(key.fileobj)
                        key.data.lines.close()

    def _hear(self, peer: _Peer) -> bool:
        """Whether that was the last of this peer."""
        try:
            said = peer.lines.makefile("r", errors="replace").readline().strip()
        except OSError:
            said = ""
        word, _, rest = said.partition(" ")
        if word == LEFT:
            return True
        if word == LOST:
            self._is_lost(*rest.split(" ", 1))
        else:
            self._is_lost(str(peer.rank), rest if word == FAILED else ENDED)
        return True

    def _is_lost(self, rank: str, reason: str) -> None:
        if self.reason is None:
            self.reason = f"rank {rank} has ended: {reason}"
            for peer in self._peers if self.rank == 0 else ():
                peer.tell(LOST, rank, reason)
            self._known.set()
            threading.Thread(target=self._end_in_time, daemon=True).start()

    def _end_in_time(self) -> None:
        """The thread that waits for the lost rank cannot be woken, so the process ends."""
        if not self._left.wait(GRACE):
            print(f"em_kernels: rank {self.rank} ends, for {self.reason}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)


class _Meeting(NamedTuple):
    """Where the first rank is, and the word by which the others are known to it."""

    host: str
    port: int
    secret: str
    listener: socket.socket | None = None

    def connect(self, rank: int) -> socket.socket:
        line = socket.create_connection((self.host, self.port), timeout=CONNECT)
        line.settimeout(None)
        _ask_when_silent(line)
        line.sendall(f"{self.secret} {rank}\n".encode())
        return line

    def accept(self, listener: socket.socket, count: int) -> list[_Peer]:
        """Those that came in time and knew the word."""
        found: list[_Peer] = []
        listener.settimeout(CONNECT)
        with listener, suppress(OSError):
            while len(found) < count:
                line, _ = listener.accept()
                line.settimeout(CONNECT)
                with suppress(OSError, ValueError):
                    word, rank = line.makefile("r", errors="replace").readline(200).split()
                    if hmac.compare_digest(word.encode(), self.secret.encode()):
                        line.settimeout(None)
                        _ask_when_silent(line)
                        found.append(_Peer(int(rank), line))
        return found


def _meet(rank: int) -> _Meeting:
    """Where to meet, by the first rank's word; on one machine nobody else can reach it."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, socket.gethostname())
    here = len(set(names)) == 1
    told: list[_Meeting | None] = [None]
    listener = None
    if rank == 0:
        listener = socket.create_server(("127.0.0.1" if here else "", 0))
        host = "127.0.0.1" if here else os.environ.get("MASTER_ADDR", names[0])
        told = [_Meeting(host, listener.getsockname()[1], secrets.token_hex(16))]
    dist.broadcast_object_list(told)
    assert told[0] is not None
    return told[0]._replace(listener=listener)


def _ask_when_silent(line: socket.socket) -> None:
    """Where the system lets that be set; a process that ends is noticed without it."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in zip(("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT"), SILENT):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
