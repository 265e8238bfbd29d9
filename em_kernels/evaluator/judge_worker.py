"""The process that asks math-verify whether two answers are equal.

It is run as a file, with `python -I`, so that it imports neither this package nor torch. Over the
socket that is its standard input it reads JSON lines: first {"path": the parent's sys.path,
"seconds", "bytes"}, to which it replies "ready" or why it is not, then [given, right], to which it
replies true, false, or null where the answer took too long or too much memory.

Answers are read in a fork of it, which an alarm ends. The next fork is ready at once, for it has
everything loaded.
"""

import contextlib
import functools
import json
import os
import signal
import sys


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    sys.path[:] = settings["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    socket = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # what libraries print is no reply
    try:
        limit_memory(settings["bytes"])
        equal = load()
    except Exception as error:
        reply(socket, f"{type(error).__name__}: {error}")
        return
    reply(socket, "ready")
    while not serve(socket, equal, settings["seconds"]):
        reply(socket, None)


def reply(socket: int, value) -> None:
    os.write(socket, json.dumps(value).encode() + b"\n")


def serve(socket: int, equal, seconds: float) -> bool:
    """Answer in a fork; whether it ended because its input did."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    for line in sys.stdin:
        given, right = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = equal(given, right)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(socket, verdict)
    os._exit(0)


def limit_memory(most: int) -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def load():
    """The comparison, with math-verify's tables built: its first use takes long."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    extraction = [LatexExtractionConfig(boxed_match_priority=0)]

    @functools.lru_cache(maxsize=1024)
    def read(latex: str):
        return parse(f"\\boxed{{{latex}}}", extraction_config=extraction, parsing_timeout=None)

    def equal(given: str, right: str) -> bool:
        try:
            return bool(verify(read(right), read(given), timeout_seconds=None))
        except Exception:
            return False

    equal(r"\frac{x}{2} + \sqrt{3}", r"(x + 2\sqrt{3})/2")
    equal(r"\{1, 2.5\}", "(1, 2]")
    return equal


if __name__ == "__main__":
    main()
