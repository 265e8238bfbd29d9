"""For mkdocstrings: functions that take `**options`, and settings, are shown as `help` shows them.

The options that public functions share stand in one TypedDict, and what is to be said of a setting
in its field; decorators make signatures and docstrings of them when the package is imported. The
sources alone do not show them.
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
        if not any("Unpack[" in str(p.annotation) for p in func.parameters):
            return
        found = griffe.dynamic_import(func.path)
        func.parameters = griffe.Parameters(*map(parameter, signature_of(found)))
        told = func.docstring or func.parent.docstring  # of the class, for its `__init__`
        func.docstring = like(told, found.__doc__, func)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Settings: their docstring, and defaults in place of the calls that declare them."""
        if not any(str(decorator.value) == "documented" for decorator in cls.decorators):
            return
        found = griffe.dynamic_import(cls.path)
        cls.docstring = like(cls.docstring, inspect.cleandoc(found.__doc__), cls)
        parameters = griffe.Parameters(*map(parameter, signature_of(found.__init__)))
        cls.set_member("__init__", griffe.Function("__init__", parameters=parameters, parent=cls))


def like(told: griffe.Docstring, text: str, parent: griffe.Object) -> griffe.Docstring:
    """The text as a docstring that is read as the one in the sources."""
    how = dict(parser=told.parser, parser_options=told.parser_options)
    made = griffe.Docstring("", parent=parent, **how)
    made.value = text  # as it is: griffe would take the margin from one that begins with "Args:"
    return made


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
