"""The process that asks math-verify whether two answers are equal.

It is run as a file, with `python -I`, so that it imports neither this package nor torch. Over the
socket that is its standard input it reads one JSON line, {"path": the parent's sys.path, "bytes"},
and replies "ready" or why it is not. Then it takes sockets, one with each byte, and serves each in
a fork of its own: JSON lines [given, right, seconds], to which the fork replies true or false. An
answer that takes longer, or too much memory, ends the fork; the next has everything loaded.
"""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import sys


def main() -> None:
    control = socket.socket(fileno=os.dup(0))
    settings = json.loads(sys.stdin.readline())
    sys.path[:] = settings["path"]
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)  # what libraries print is no reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    try:
        limit_memory(settings["bytes"])
        equal = load()
    except Exception as error:
        reply(control, f"{type(error).__name__}: {error}")
        return
    reply(control, "ready")
    while True:
        received, taken, *_ = socket.recv_fds(control, 1, 1)
        if not received:
            return
        with socket.socket(fileno=taken[0]) as line:
            if os.fork() == 0:
                control.close()
                serve(line, equal)
                os._exit(0)


def serve(line: socket.socket, equal) -> None:
    for request in line.makefile():
        given, right, seconds = json.loads(request)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = equal(given, right)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(line, verdict)


def reply(line: socket.socket, value) -> None:
    line.sendall(json.dumps(value).encode() + b"\n")


def limit_memory(most: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def load():
    """The comparison, with math-verify's tables built: its first use takes long."""
    import logging

    import sympy
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    options = {"allow_set_relation_comp": True, "timeout_seconds": None}  # x > 5 is (5, oo)
    config = LatexExtractionConfig(boxed_match_priority=0)
    # Units are off before it is asked; it takes ab in 6ab for one.
    normal = dataclasses.replace(config.normalization_config, units=False)
    extraction = [dataclasses.replace(config, normalization_config=normal)]

    @functools.lru_cache(maxsize=1024)
    def read(latex: str):
        found = parse(f"\\boxed{{{latex}}}", extraction_config=extraction, parsing_timeout=None)
        return [alike(value) for value in found]

    def alike(value):
        """Its letters as those of any other answer: real, but for i; math-verify guesses that."""
        if not hasattr(value, "free_symbols"):
            return value
        letters = {s: sympy.Symbol(s.name, real=True) for s in value.free_symbols}
        letters = {s: sympy.I if s.name == "i" else real for s, real in letters.items()}
        with sympy.evaluate(False):  # an equation of an unknown with its value is not False
            return value.xreplace({s: letter for s, letter in letters.items() if s != letter})

    def equal(given: str, right: str) -> bool:
        try:
            return bool(verify(read(right), read(given), **options))
        except Exception:
            return False

    equal(r"\frac{x}{2} + \sqrt{3}", r"(x + 2\sqrt{3})/2")
    equal(r"\{1, 2.5\}", "(1, 2]")
    return equal


if __name__ == "__main__":
    main()
