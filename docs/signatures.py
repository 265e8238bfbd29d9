"""For mkdocstrings: functions that take `**options` are shown as `help` shows them.

The options that public functions share stand in one TypedDict, and a decorator gives each function
the flat signature and the whole docstring when it is imported; the sources alone do not show them.
"""

from __future__ import annotations

import inspect
from typing import Any

import griffe

KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: griffe.ParameterKind.positional_only,
    inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    inspect.Parameter.VAR_POSITIONAL: griffe.ParameterKind.var_positional,
    inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
    inspect.Parameter.VAR_KEYWORD: griffe.ParameterKind.var_keyword,
}


class RuntimeSignatures(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        spread = [p for p in func.parameters if p.kind is griffe.ParameterKind.var_keyword]
        if not spread or not func.path.startswith("em_kernels.") or func.name.startswith("_"):
            return
        found = griffe.dynamic_import(func.path)
        func.parameters = griffe.Parameters(*map(parameter, signature_of(found)))
        if func.docstring is not None and found.__doc__:
            func.docstring.value = inspect.cleandoc(found.__doc__)


def signature_of(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def parameter(p: inspect.Parameter) -> griffe.Parameter:
    annotation = None if p.annotation is p.empty else text_of(p.annotation)
    default = None if p.default is p.empty else repr(p.default)
    return griffe.Parameter(p.name, annotation=annotation, kind=KINDS[p.kind], default=default)


def text_of(annotation: Any) -> str:
    """`Tensor | None`, not `torch.Tensor | None`, be it a string or what it stands for."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return text.replace("torch.Tensor", "Tensor")
