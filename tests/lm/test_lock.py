"""One process at a time in a folder, and what a process that is gone has left."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace

import pytest

from em_kernels.lm import lock
from em_kernels.lm.lock import LOCK, Holder, InUseError, held, started

HOLD = """
import runpy, sys
held = runpy.run_path(sys.argv[2])["held"]  # without torch, which takes long
with held(sys.argv[1], "a test"):
    print("held", flush=True)
    sys.stdin.read()  # until it is killed
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), lock.__file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write(folder, **changes) -> Holder:
    """A lock of this process, but for the changes."""
    folder.mkdir(exist_ok=True)
    holder = replace(Holder.now("a test"), **changes)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def test_the_second_is_told_who_holds_it(tmp_path, other):
    with pytest.raises(InUseError) as caught, held(tmp_path / "run", "another"):
        pass
    text = str(caught.value)
    assert f"in use (a test, process {other.pid} on " in text and "\n" not in text
    assert "remove" not in text  # it can be seen that it runs
    assert (tmp_path / "run" / LOCK).exists()


def test_what_a_killed_process_left_is_taken_over_and_that_is_said(tmp_path, other):
    other.kill()  # not waited for: it is there still, as what remains of a process
    while started(other.pid) is not None:
        time.sleep(0.01)
    said = f"left by a test, process {other.pid} .*taken over"
    with pytest.warns(UserWarning, match=said), held(tmp_path / "run", "another"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="times of start are of /proc")
def test_another_process_of_the_same_number_is_told_apart(tmp_path):
    write(tmp_path, pid=os.getppid(), started="1")
    with pytest.warns(UserWarning, match="taken over"), held(tmp_path, "another"):
        pass


def test_after_a_restart_of_the_machine_nobody_is_there(tmp_path):
    own = Holder.now("a test")
    found = replace(own, machine="m", boot="before", pid=os.getppid())
    assert found.is_gone(replace(own, machine="m", boot="now"))
    assert not replace(found, machine="").is_gone(replace(own, machine="", boot="now"))


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"space": "pid:[1]"}])
def test_of_another_machine_it_is_said_what_to_remove(tmp_path, changes):
    write(tmp_path, pid=2**22 + 1, **changes)
    said = r"if it does not, remove .*/\.lock$"
    with pytest.raises(InUseError, match=said), held(tmp_path, "another"):
        pass


def test_not_twice_in_one_process_either(tmp_path):
    with held(tmp_path, "a test"):
        with pytest.raises(InUseError, match=f"process {os.getpid()} "), held(tmp_path, "again"):
            pass
        with held(tmp_path, "something else", ".other.lock"):
            pass
    with held(tmp_path, "a test"):
        pass


@pytest.mark.parametrize("left", [b"", b"{", b"[1]", b"{}", b"\xff\0", b"[" * 60_000])
def test_a_file_that_says_nothing_holds_nothing(tmp_path, left):
    (tmp_path / LOCK).write_bytes(left)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with held(tmp_path, "a test"):
            pass


def test_a_folder_that_stays_empty_is_not_left(tmp_path):
    with pytest.raises(KeyError), held(tmp_path / "a" / "b", "a test"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    with held(tmp_path / "a" / "b", "a test"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_fork_does_not_give_back_what_its_parent_holds(tmp_path):
    class Leave(Exception):
        """Of the child, which leaves the block."""

    try:
        with held(tmp_path, "a test"):
            child = os.fork()
            if child == 0:
                with pytest.raises(InUseError), held(tmp_path, "a child"):
                    pass
                raise Leave
            assert os.waitpid(child, 0)[1] == 0
            assert (tmp_path / LOCK).exists()
    except Leave:
        os._exit(0)
    except BaseException:
        if child == 0:
            os._exit(1)
        raise
    assert not (tmp_path / LOCK).exists()


def try_to_hold(folder, barrier, results) -> None:
    barrier.wait()
    try:
        with held(folder, "one of several"):
            results.put("held")
            barrier.wait()  # until all have tried
    except InUseError:
        results.put("refused")
        barrier.wait()


def test_of_several_that_find_a_stale_one_at_once_one_gets_it(tmp_path):
    write(tmp_path, pid=2**22 + 1)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6, timeout=600), context.Queue()
    processes = [
        context.Process(target=try_to_hold, args=(tmp_path, barrier, results)) for _ in range(6)
    ]
    for process in processes:
        process.start()
    found = sorted(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    assert found == ["held"] + ["refused"] * 5
