"""Settings in a file: YAML, TOML or JSON, a mapping from their names to their values."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from em_kernels.lm.optional import require
from em_kernels.lm.settings import check_setting, settings_of
from em_kernels.lm.text import did_you_mean, one_line

_FLOAT = re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")
"""2e-5 is a number, as in YAML 1.2; to PyYAML, which reads YAML 1.1, it is text without a point."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a .yaml, .yml, .toml or .json file says, by name; lists as tuples.

    Raises:
        OSError: it cannot be opened.
        ImportError: a .yaml file without PyYAML.
        ValueError: another kind of file, one that cannot be read, or that holds no mapping, or a
            name twice. It names the file.
    """
    path = Path(path)
    readers = {".yaml": _read_yaml, ".yml": _read_yaml, ".toml": _read_toml, ".json": _read_json}
    if path.suffix not in readers:
        raise ValueError(f"{path}: settings are read from {', '.join(readers)} files")
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        found = _tuples(readers[path.suffix](path.read_text(encoding="utf-8-sig")))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise ValueError(
            f"{path} must hold settings by name, as `updates: 10`, got "
            + ("nothing" if found is None else one_line(ValueError(repr(found)), 60))
        )
    return found


def check_names(path: str | Path, values: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise a ValueError that names the file and its first setting that is not `known`."""
    known = list(known)
    for name in values:
        if name not in known:
            meant = did_you_mean(str(name).replace("-", "_"), known)
            raise ValueError(f"{path}: no setting is called {name!r}{meant}")


def check_values(path: str | Path, values: Mapping[str, Any], cls: type) -> None:
    """Check each of the values that are settings of the class by itself.

    Raises:
        TypeError, ValueError: naming the file, the setting and what it holds.
    """
    for name in values.keys() & settings_of(cls).keys():
        try:
            check_setting(cls, name, values[name])
        except TypeError as error:
            raise TypeError(f"{path}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def settings_text(values: Mapping[str, Any], notes: Iterable[str] = ()) -> str:
    """A YAML file that `read_settings` reads back to the last bit; the notes come first."""
    yaml, _, dumper = _yaml()
    plain = json.loads(json.dumps(values))
    text = yaml.dump(plain, Dumper=dumper, sort_keys=False, allow_unicode=True, width=96)
    return "".join(f"# {note}\n" for note in notes) + text


def _tuples(value: Any) -> Any:
    """With tuples in the place of lists, as settings are kept."""
    if isinstance(value, dict):
        return {name: _tuples(inner) for name, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_yaml(text: str) -> Any:
    yaml, loader, _ = _yaml()
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML ({one_line(error)})") from None


def _read_toml(text: str) -> Any:
    try:
        tomllib = importlib.import_module("tomllib")
    except ImportError:
        raise ValueError("TOML needs Python 3.11 or newer; write the settings as YAML") from None
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid TOML ({error})") from None


def _read_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_each_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from None


def _each_once(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands in it twice")
        found[name] = value
    return found


@cache
def _yaml() -> tuple[Any, Any, Any]:
    """PyYAML, with its safe loader and dumper where 2e-5 is a number and a name comes once."""
    yaml: Any = require("yaml", "pyyaml", "write the settings as .json")

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            _each_once((str(key.value), None) for key, _ in node.value)
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):
        def represent_text(self, text: str) -> Any:
            style = '"' if "\x85" in text else None  # a line's end that PyYAML forgets to escape
            return self.represent_scalar("tag:yaml.org,2002:str", text, style)

    Dumper.add_representer(str, Dumper.represent_text)

    for cls in (Loader, Dumper):
        cls.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
    return yaml, Loader, Dumper
