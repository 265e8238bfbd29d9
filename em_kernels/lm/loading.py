"""Files of a model that somebody else wrote: nothing in them is run, and what is wrong is said."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from em_kernels.lm.heads import ModelError
from em_kernels.lm.text import one_line


@contextmanager
def loading(failed: str, trust: bool = True, silent: str = "") -> Iterator[None]:
    """What another library raises in the block as a ModelError of one line.

    `silent` is what to say in place of its own words, where a hub did not answer.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")  # said below
            yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{failed}: {reason_of(error, trust, silent)}") from error


def reason_of(error: BaseException, trust: bool = True, silent: str = "") -> str:
    """What is wrong, in our own words where another library's would have the user run the code."""
    causes = f"{error} {error.__cause__} {error.__context__}"
    if not trust and "trust_remote_code" in causes:
        return (
            "it brings Python code of its own, which is not run: read the code, and give "
            "trust_remote_code=True if you trust it"
        )
    if "weights_only" in causes or "Weights only load failed" in causes:
        return f"its pickled weights hold {refused_pickle(causes)}, and only tensors are read"
    if silent:
        return silent
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        return f"a file of it is not as it should be ({type(error).__name__}: {one_line(error)})"
    return one_line(error)


def refused_pickle(said: str) -> str:
    """What torch's reader of tensors has refused, out of its message."""
    found = re.search(r"(?:GLOBAL|class|function|Global:?) ([\w.]+)", said)
    return f"a call of {found[1]}" if found else "something else than tensors"


def check_kernels(model: str, config, trust: bool) -> None:
    """A config may name kernels on the hub for its attention, which are compiled code.

    Raises:
        ModelError: it does.
    """
    for name in ("_attn_implementation", "_experts_implementation"):
        for part in (config, config.get_text_config()):
            named = getattr(part, name, None)
            if not trust and isinstance(named, str) and "/" in named:
                raise ModelError(
                    f"the config of {model!r} has {name[1:]} {named!r}, code from the hub, which "
                    "is not run: take that out of its config.json, or give trust_remote_code=True "
                    "if you trust it"
                )
