"""A NamedTuple as the arguments of an operator in a row, and as their schema.

An operator takes the fields in their order, and where a field is a NamedTuple itself, the fields of
that. So an argument is added where the field is, and nowhere else. Fields that came after programs
had been exported (`Argument.last`) follow after all others, so that those still load.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_Record = TypeVar("_Record", bound=tuple[Any, ...])
_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    torch.dtype: "ScalarType",
    Sequence[str]: "str[]",
    Sequence[Tensor]: "Tensor[]",
    **{kind: kind.__name__ for kind in (bool, int, float, str)},
}


class _Layout(NamedTuple):
    """How a record lies among the arguments."""

    parts: list[tuple[Any, int]]  # (the NamedTuple that a field is or None, its arguments)
    first: int  # how many of the arguments are not `last`
    size: int
    defaults: list[Any]  # of the last arguments


_LAYOUTS: dict[type, _Layout] = {}
_FIRST: dict[type, int] = {}  # of a NamedTuple, how many of its fields are not `last`


def arguments(kind: type[_Record]) -> type[_Record]:
    """A NamedTuple whose fields, and theirs where one is a NamedTuple, are arguments in a row."""
    parts, last = [], []
    for hint in get_type_hints(kind).values():
        if hasattr(hint, "_fields"):
            _FIRST[hint] = sum(not _is_last(note) for _, note in _hints(hint))
            last += [hint._field_defaults[name] for name in hint._fields[_FIRST[hint] :]]
            parts.append((hint, _FIRST[hint]))
        else:
            parts.append((None, 1))
    defaults = flat(tuple(kind._field_defaults.values()))  # type: ignore[attr-defined]
    first = sum(count for _, count in parts)
    _LAYOUTS[kind] = _Layout(parts, first, first + len(last), [*defaults, *last])
    return kind


def flat(record: tuple[Any, ...]) -> list[Any]:
    """The arguments that a record stands for."""
    values: list[Any] = []
    last: list[Any] = []
    for value in record:
        first = _FIRST.get(type(value))
        if first is None:
            values.append(value)
        elif first == len(value):
            values.extend(value)
        else:
            values.extend(value[:first])
            last.extend(value[first:])
    return values + last


def given(record: tuple[Any, ...]) -> list[Any]:
    """`flat` without the last arguments, where they are what they are if left out."""
    values, first = flat(record), _LAYOUTS[type(record)].first
    if all(value is None or value is False for value in values[first:]):
        del values[first:]
    return values


def unflat(kind: type[_Record], values: Sequence[Any]) -> _Record:
    """The record that stands for the arguments; the dispatcher leaves out defaults at the end."""
    layout = _LAYOUTS[kind]
    if len(values) < layout.size:
        values = [*values, *layout.defaults[len(values) - layout.size :]]
    start, end, fields = 0, layout.first, []
    for part, count in layout.parts:
        own = values[start : start + count]
        if part is None:
            fields.append(own[0])
        else:
            more = len(part._fields) - count
            fields.append(part(*own, *values[end : end + more]))
            end += more
        start += count
    return kind(*fields)


def nothing(kind: type[_Record]) -> _Record:
    """The record of as many None."""
    return unflat(kind, [None] * _LAYOUTS[kind].size)


def schema(kind: type[tuple[Any, ...]]) -> str:
    """The arguments as a schema declares them; what a record has by default can be left out."""
    defaults = kind._field_defaults  # type: ignore[attr-defined]
    declared: list[str] = []
    last: list[str] = []
    for (name, hint), (part, count) in zip(_hints(kind), _LAYOUTS[kind].parts, strict=True):
        own = [_declared(*field) for field in (_hints(part) if part else [(name, hint)])]
        if name in defaults:
            values = defaults[name] if part else (defaults[name],)
            own = [f"{text}={value}" for text, value in zip(own, values, strict=True)]
        elif part:
            ends = [f"={part._field_defaults[field]}" for field in part._fields[count:]]
            own[count:] = [text + end for text, end in zip(own[count:], ends, strict=True)]
        declared.extend(own[:count])
        last.extend(own[count:])
    return ", ".join(declared + last)


def _hints(kind: type) -> list[tuple[str, Any]]:
    return list(get_type_hints(kind, include_extras=True).items())


def _is_last(hint: Any) -> bool:
    return get_origin(hint) is Annotated and bool(hint.__metadata__[0].last)


def _declared(name: str, hint: Any) -> str:
    noted = hint.__metadata__[0].name if get_origin(hint) is Annotated else ""
    return f"{_type(hint)} {noted or name}"


def _type(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        base, note = get_args(hint)
        return str(note.type or _type(base))
    if get_origin(hint) in (Union, UnionType):
        base, _ = get_args(hint)  # with None
        return f"{_type(base)}?"
    return _TYPES[hint]
