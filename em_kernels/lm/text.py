"""What another library's error says, for a message of this one's."""

from __future__ import annotations


def one_line(error: BaseException, most: int | None = 400) -> str:
    """Its text without line breaks, cut after `most` characters; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__
