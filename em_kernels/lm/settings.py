"""Settings of a run: one field of a dataclass carries its default, meaning, check and flag.

    @documented
    @dataclass(frozen=True)
    class RunConfig:
        updates: int = setting(10, "optimiser updates", check=at_least(1))

        def __post_init__(self):
            check_settings(self)

`check_settings` makes the errors, `add_flags` and `given_settings` the command line, `documented`
the docstring, which is the page of the documentation too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from em_kernels.lm.text import did_you_mean

Check = Callable[[str, Any], Any]
"""(name, value) -> the value as it is kept; raises TypeError or ValueError that names it."""
C = TypeVar("C", bound=type)
_META = "setting"
_DOCUMENTED: set[type] = set()
_WORDS: dict[Any, str] = {str: "text", tuple: "a list"}
_RAISES = """
    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """


class Setting(NamedTuple):
    """What a field carries besides its type and default.

    Args:
        help: what it decides, in a sentence without a capital or a full stop.
        check: called with name and value; None is let through where the type has it.
        choices: what the value must be one of, None among them where the type has it.
        flag: "--name" unless given.
        no_flag: why there is no flag of its own.
        metavar: what the flag's value is called.
        group: heading of the flags that belong together.
        shown: the default in words, as what None stands for.
    """

    help: str
    check: Check | None = None
    choices: tuple[Any, ...] | None = None
    flag: str | None = None
    no_flag: str | None = None
    metavar: str | None = None
    group: str = ""
    shown: str | None = None

    @property
    def named(self) -> tuple[str, ...]:
        """The choices but None, which a flag that is left out stands for."""
        return tuple(choice for choice in self.choices or () if choice is not None)


def setting(default: Any, help: str, **told: Any) -> Any:
    """A field of a dataclass of settings, by the names of `Setting`; see there.

    A setting with the default `MISSING` must be given.
    """
    return field(default=default, metadata={_META: Setting(help, **told)})


def redefined(cls: type, name: str, default: Any = MISSING, **changes: Any) -> Any:
    """The setting `name` of a base class, with another default or other properties."""
    base = next(item for item in fields(cls) if item.name == name)
    default = base.default if default is MISSING else default
    return field(default=default, metadata={_META: read_setting(base)._replace(**changes)})


def read_setting(item: Field[Any]) -> Setting:
    told: Setting = item.metadata[_META]
    return told


def settings_of(cls: type) -> dict[str, Setting]:
    """By name, in the order of the fields."""
    return {item.name: read_setting(item) for item in fields(cls)}


# Checks


def check_settings(config: Any) -> None:
    """Check every field of a dataclass of settings, and keep what the checks make of the values.

    Raises:
        TypeError, ValueError: naming the field and what was received.
    """
    for item in fields(config):
        value = check_setting(type(config), item.name, getattr(config, item.name))
        object.__setattr__(config, item.name, value)


def check_setting(cls: type, name: str, value: Any) -> Any:
    """The value as a dataclass of settings keeps it.

    Raises:
        TypeError, ValueError: naming the setting and what was received.
    """
    kind, told = _kinds(cls)[name], settings_of(cls)[name]
    if told.choices is not None and not kind.several:
        check_choice(name, value, told.choices)
    if value is None and kind.optional:
        return value
    if kind.of is bool:
        check_flag(name, value)
    if told.check is not None:
        value = told.check(name, value)
    elif kind.of is str and told.choices is None and not isinstance(value, kind.whole):
        wanted = " or ".join(_WORDS[one] for one in kind.whole)
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    if told.choices is not None and kind.several:
        for one in value:
            check_choice(name, one, told.choices)
    return value


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_int(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return value


def check_float(name: str, value: Any, good: Callable[[float], bool], rule: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    # No float holds a larger int, and math.isfinite would raise.
    if not (abs(value) <= sys.float_info.max and good(value)):
        raise ValueError(f"{name} must be {rule} and finite, got {value!r}")
    return value


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if choices == (None,) and value is not None:
        raise ValueError(f"{name} must be left out here, got {value!r}")
    if value not in choices:
        near = did_you_mean(str(value), [one for one in choices if isinstance(one, str)])
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{near}")


def at_least(least: int) -> Check:
    return lambda name, value: check_int(name, value, least)


def number(good: Callable[[float], bool], rule: str) -> Check:
    """A finite number that is `good`; `rule` says what that is."""
    return lambda name, value: check_float(name, value, good, rule)


positive = number(lambda v: v > 0, "positive")
not_negative = number(lambda v: v >= 0, "0 or more")
fraction = number(lambda v: 0 < v <= 1, "in (0, 1]")
share = number(lambda v: 0 <= v <= 1, "in [0, 1]")
finite = number(math.isfinite, "a number")


def path_text(name: str, value: Any) -> str:
    """A path or a name, as text."""
    try:
        path = os.fspath(value)
    except TypeError:
        path = None
    if not isinstance(path, str):  # bytes are paths too
        raise TypeError(f"{name} must be a path or a name, got {value!r}")
    if not path.strip() or "\0" in path:
        raise ValueError(f"{name} must be a path or a name, got {path!r}")
    return path


def texts(name: str, value: Any) -> tuple[Any, ...]:
    """One text or several, as several."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise TypeError(f"{name} must be one text or several, got {value!r}")
    return tuple(value)


def key_values(name: str, value: Any) -> dict[str, Any]:
    """Values of JSON by name: a mapping, or texts KEY=VALUE, or one text that is a JSON object.

    A value that is no JSON is text, but for Python's True, False and None.
    """
    if isinstance(value, Mapping):
        try:
            return json.loads(json.dumps(dict(value), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must have values of JSON, {error}, got {value!r}") from None
    found: dict[str, Any] = {}
    for text in texts(name, value):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be KEY=VALUE or a JSON object, got {text!r}")
        if isinstance(_json(text), dict):
            found |= _json(text)
            continue
        key, sign, told = text.partition("=")
        if not sign or not key.strip():
            raise ValueError(f"{name} must be KEY=VALUE or a JSON object, got {text!r}")
        found[key.strip()] = _json(
            {"True": "true", "False": "false", "None": "null"}.get(told, told)
        )
    return found


def _json(text: str) -> Any:
    """What it says as JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def device_text(name: str, value: Any) -> str:
    """A device's name; a torch.device has one."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name} must be the name of a device, got {value!r}")
    return str(value)


# Flags


def add_flags(
    parser: argparse.ArgumentParser,
    cls: type,
    *,
    only: Container[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    others: Mapping[str, type] | None = None,
    required: bool = True,
) -> None:
    """An option for each setting of `cls`; one that is not given stays out of the namespace.

    Args:
        only: the names of the settings, in place of all.
        defaults: of this command, by name, in place of the settings' own.
        others: further classes that the same options may be for, by when that is ("with --x"). A
            choice of one is a choice of all: the class that is made refuses what it does not have.
        required: whether a setting that must be given must be given as a flag.
    """
    groups: dict[str, Any] = {"": parser}
    classes = {"": cls, **(others or {})}
    for name in dict.fromkeys(name for one in classes.values() for name in settings_of(one)):
        if only is not None and name not in only:
            continue
        having = {when: one for when, one in classes.items() if name in settings_of(one)}
        told = settings_of(next(iter(having.values())))[name]
        if told.no_flag is not None:
            continue
        if told.group not in groups:
            groups[told.group] = parser.add_argument_group(told.group)
        own = (defaults or {}).get(name, argparse.SUPPRESS)
        groups[told.group].add_argument(
            flag_of(name, told), dest=name, default=own, **_option(name, having, own, required)
        )


def given_settings(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The settings of `cls` that the command line gives."""
    names = settings_of(cls)
    return {name: value for name, value in vars(arguments).items() if name in names}


def flag_of(name: str, told: Setting) -> str:
    return told.flag or "--" + name.replace("_", "-")


def _option(name: str, having: Mapping[str, type], own: Any, required: bool) -> dict[str, Any]:
    """What argparse is told about a flag, by the classes that have the setting."""
    first = next(iter(having.values()))
    told, kind = settings_of(first)[name], _kinds(first)[name]
    text = _help(name, having) if own is argparse.SUPPRESS else f"{told.help} (default {own})"
    option: dict[str, Any] = {"help": text.replace("%", "%%")}
    if kind.of is bool:
        return {**option, "action": argparse.BooleanOptionalAction}
    if told.metavar:
        option["metavar"] = told.metavar
    if kind.several or get_origin(kind.of) is Mapping:
        option["nargs"] = "+"
        if own is argparse.SUPPRESS:  # given twice, they are taken together
            option["action"] = "extend"
    every = [choice for one in having.values() for choice in settings_of(one)[name].named]
    if every:
        return {**option, "choices": tuple(dict.fromkeys(every))}
    if required and _is_required(first, name):
        option["required"] = True
    return option if get_origin(kind.of) is Mapping else {**option, "type": kind.of}


def _help(name: str, having: Mapping[str, type]) -> str:
    """With the default of each class where they differ: "updates (default 10; 100 with --x)"."""
    shown = {when: _default(one, name) for when, one in having.items()}
    first = next(iter(shown.values()))
    others = [f"; {text} {when}" for when, text in shown.items() if text != first]
    cls = next(iter(having.values()))
    word = "" if _is_required(cls, name) else "default "
    return f"{settings_of(cls)[name].help} ({word}{first}{''.join(others)})"


# Documentation


def documented(cls: C) -> C:
    """Append what is known of the settings to the docstring; what a documented base says is left
    out."""
    bases = [base for base in reversed(cls.__mro__[1:]) if base in _DOCUMENTED]
    inherited = {name: _told(base, name) for base in bases for name in settings_of(base)}
    new = (name for name in settings_of(cls) if inherited.get(name) != _told(cls, name))
    lines = [f"{name}: {_help(name, {'': cls})}." for name in new]
    fill = textwrap.TextWrapper(
        width=96, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
    ).fill
    args = [fill(line) for line in lines]
    cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "    Args:", *args, _RAISES])
    _DOCUMENTED.add(cls)
    return cls


def _told(cls: type, name: str) -> tuple[str, Setting]:
    return _default(cls, name), settings_of(cls)[name]


def _default(cls: type, name: str) -> str:
    if _is_required(cls, name):
        return "must be given"
    value = cls.__dataclass_fields__[name].default  # type: ignore[attr-defined]
    return settings_of(cls)[name].shown or ("none" if value is None else str(value))


def _is_required(cls: type, name: str) -> bool:
    return cls.__dataclass_fields__[name].default is MISSING  # type: ignore[attr-defined]


# Types


class _Kind(NamedTuple):
    """The type of a setting's value, or of each of several; whether it may be None; what a value
    as a whole may be."""

    of: type
    several: bool
    optional: bool
    whole: tuple[Any, ...]


@cache
def _kinds(cls: type) -> dict[str, _Kind]:
    return {name: _kind(hint) for name, hint in get_type_hints(cls).items()}


def _kind(hint: Any) -> _Kind:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = tuple(get_origin(part) or part for part in parts if part is not NoneType)
    first = next(part for part in parts if part is not NoneType)
    several = get_origin(first) is tuple
    return _Kind(get_args(first)[0] if several else first, several, NoneType in parts, types)
