"""Mappings of a user's file become frozen dataclasses, strictly: every error names the place. No jax here."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class InputError(ValueError):
    """Something the user gave cannot be used. The message names the place, what was found and what was expected."""


def require(holds: bool, message: str) -> None:
    """Raises `InputError` with the message unless the condition holds."""
    if not holds:
        raise InputError(message)


def from_tree(kind: type[T], tree: Mapping[str, Any], *, place: str) -> T:
    """Builds a dataclass from nested mappings, strictly.

    Args:
        kind: the dataclass.
        tree: mapping of its fields; a float may be an integer or a string such as "1e-3", which YAML reads as text.
        place: where the mapping comes from, for messages.
    Raises:
        InputError: unknown or missing keys, wrong types, or a value that the dataclass refuses.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise InputError(f"{place}: unknown key {key!r}; {known}")
        values[key] = _typed(hints[key], value, place=f"{place}: {key}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{place}: missing {', '.join(missing)}")
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _typed(hint: Any, value: Any, *, place: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = [option for option in typing.get_args(hint) if option is not types.NoneType]
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise InputError(f"{place}: expected a mapping, found {value!r}")
        return from_tree(typing.cast(type, hint), value, place=place)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{place}: expected a list, found {value!r}")
        return tuple(_typed(typing.get_args(hint)[0], item, place=place) for item in value)
    if hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # not a number, or an integer beyond every float
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is hint:
        return value
    raise InputError(f"{place}: expected {hint.__name__}, found {value!r}")
