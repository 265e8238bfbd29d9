"""What would run as soon as it is unpickled or imported, and what is odd in a text file."""

from __future__ import annotations

import os
from pathlib import Path


class Evil:
    """Unpickled, it makes the folder `mark`."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def module(mark: Path) -> str:
    """A module that does the same when it is imported."""
    return f"import os\nos.mkdir({str(mark)!r})\n"


ODD_OBJECTS = {
    "nothing": b"",
    "empty": b"{}",
    "list": b"[1, 2]",
    "number": b"3",
    "deep": b"[" * 100_000,
    "half": b'{"a": ',
    "nul": b'{"a": "\0',
    "latin": '{"a": "\u00e4"}'.encode("latin-1"),
    "bom": b'\xef\xbb\xbf{"a": 1}\r\n',
}
"""Of a file that is to hold an object: nothing of the sort is in them, whatever it is for."""
