"""Configuration files: TOML and JSON mappings over nested frozen dataclasses, checked key by key."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from longscan.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

C = TypeVar("C")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested mappings.

    Raises:
        ConfigError: it is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"config: cannot read {path}: {error}") from error


def merge(defaults: C, values: Mapping[str, Any], where: str, prefix: str = "") -> C:
    """A dataclass with the fields that ``values`` names replaced, nested ones by nested mappings.

    Raises:
        ConfigError: a key is unknown (the nearest one is named) or a value is of the wrong kind.
    """
    assert dataclasses.is_dataclass(defaults)
    assert not isinstance(defaults, type)
    hints = typing.get_type_hints(type(defaults))
    names = [field.name for field in dataclasses.fields(defaults)]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ConfigError(f"{where}: unknown key {prefix + key!r}{hint}; allowed: {', '.join(names)}")
        current = getattr(defaults, key)
        if dataclasses.is_dataclass(current) and isinstance(value, Mapping):
            changes[key] = merge(current, value, where, f"{prefix}{key}.")
        elif not _fits(value, hints[key]):
            raise ConfigError(f"{where}: {prefix}{key} must be {_words(hints[key])}, got {value!r}")
        else:
            changes[key] = tuple(value) if isinstance(value, list) else value
    try:
        return dataclasses.replace(defaults, **changes)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Every field that differs between two dataclasses of one type, in words."""
    found = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            found += differences(before, after, f"{prefix}{field.name}.")
        elif before != after:
            found.append(f"{prefix}{field.name} is {before!r} there and {after!r} here")
    return found


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _fits(value, typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, member) for member in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, (str, Path))
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _words(typing.get_args(hint)[0])
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(member) for member in typing.get_args(hint))
    if hint is type(None):
        return "none"
    known = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return known.get(hint, getattr(hint, "__name__", str(hint)))
