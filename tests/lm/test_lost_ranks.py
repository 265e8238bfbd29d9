"""A rank that ends, however it does, ends the others soon, and they say which it was and why.

The time that a rank has to end by itself is shortened, for it is waited for.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from em_kernels.lm import lost_ranks
from em_kernels.lm.ranks import LostRankError, joined_ranks

LONG = 3600
LIMIT = 600  # of the test, for ranks that are not ended


def busy(rank: int) -> None:
    time.sleep(LONG)


def in_an_exchange(rank: int) -> None:
    dist.barrier()


def ends(rank: int, case: str) -> None:
    if case == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "exits":
        os._exit(0)
    raise ValueError("no such thing")


def rank_of_a_run(rank: int, folder: str, case: str, ending: int) -> None:
    """The one that is `ending` ends, one after it waits for it, one is busy with its own."""
    sys.stderr = open(f"{folder}/{rank}.txt", "w")  # noqa: SIM115
    lost_ranks.GRACE, lost_ranks.CONNECT = 1.0, LIMIT
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    try:
        with joined_ranks("cpu") as ranks:
            ranks.gather(lambda: None)
            if rank == ending:
                ends(rank, case)
            (busy if (rank - ending) % 3 == 2 else in_an_exchange)(rank)
    except LostRankError as error:
        print(f"LostRankError: {error}", file=sys.stderr, flush=True)
    os._exit(0)


@pytest.mark.timeout(2 * LIMIT)
@pytest.mark.parametrize(
    "case, ending, reason",
    [
        ("killed", 1, lost_ranks.ENDED),
        ("exits", 0, lost_ranks.ENDED),
        ("fails", 2, "ValueError: no such thing"),
    ],
)
def test_a_rank_that_ends_ends_the_others(tmp_path, case, ending, reason):
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=rank_of_a_run, args=(rank, str(tmp_path), case, ending))
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    processes[ending].join()
    until = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0, until - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert late == []
    assert lost_ranks.GRACE < 60  # beside it nothing is waited for
    for rank in {0, 1, 2} - {ending}:
        assert f"rank {ending} has ended: {reason}" in (tmp_path / f"{rank}.txt").read_text()


def test_what_does_not_know_the_word_is_no_rank():
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    meeting = lost_ranks._Meeting("127.0.0.1", port, "word", listener)
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"another 1\n")
        own = meeting.connect(2)
        (peer,) = meeting.accept(listener, 1)
    assert peer.rank == 2
    for line in (own, peer.lines):
        assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        line.close()
