"""Asking the hub for a model or a data set without waiting for one that does not answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from em_kernels.lm.optional import require
from em_kernels.lm.text import one_line

SECONDS = 5.0


def looks_like_a_path(name: str) -> bool:
    """Whether it is meant as a path, not as the OWNER/NAME of the hub."""
    if name.startswith((".", "~", "/")) or name.endswith("/") or "\\" in name:
        return True
    if "/" not in name:  # a file of that kind; names of models have numbers behind their dots
        return Path(name).suffix[1:].isalpha()
    return name.count("/") > 1 or Path(name.split("/")[0]).exists()


@contextmanager
def quick_to_fail(name: str) -> Iterator[str]:
    """While the block loads `name`: a hub that gives no answer is asked no more.

    What is in its cache is found as ever. Without this the libraries try again for 25 to 50 s. It
    is as with HF_HUB_OFFLINE=1 in the environment, for as long as the block takes.

    Yields:
        What to say where it is not found: "" of a folder, and where the hub answers.
    """
    if Path(name).expanduser().is_dir():
        yield ""
        return
    constants = require("huggingface_hub.constants", "em-kernels[train]")
    refused = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _no_answer(constants)
    if not refused:
        yield ""
        return
    told = [constants, *([sys.modules["datasets"].config] if "datasets" in sys.modules else [])]
    before = [module.HF_HUB_OFFLINE for module in told]
    try:
        for module in told:
            module.HF_HUB_OFFLINE = True
        yield (
            f"no folder {name} is here, nor is it in the cache of {constants.ENDPOINT}, which "
            f"cannot be asked: {refused}"
        )
    finally:
        for module, value in zip(told, before):
            module.HF_HUB_OFFLINE = value


def _no_answer(constants: Any) -> str:
    """Why the hub does not answer, tried once; "" where it does, whatever it says."""
    utils = require("huggingface_hub.utils", "em-kernels[train]")
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the client of HTTP that this version has
        return one_line(error, 120)
    return ""
