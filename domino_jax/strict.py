"""Mappings of a user's file become frozen dataclasses, strictly: every error names the place. No jax here."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Scalar = bool | int | float | str
Scalars = Mapping[str, Scalar]  # settings whose names somebody else defines, a chat template for example


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
        tree: mapping of its fields; a float may be an integer or a string such as "1e-3", which YAML
            reads as text. A field of type `Scalars` takes a mapping, see `scalars`; where its
            dataclass is to be hashable, the field is declared with `hash=False`.
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


def scalars(value: Any, *, place: str) -> dict[str, Scalar]:
    """A mapping from names to plain values, each in the type it was written in.

    Only who reads a name knows its type, so nothing is converted: "1e-3", which YAML reads as text,
    stays text.

    Raises:
        InputError: not a mapping, a name that is not text, or a value that is none of true, false, a
            finite number and text.
    """
    if not isinstance(value, dict):
        raise InputError(f"{place}: expected a mapping, found {value!r}")
    for name, item in value.items():
        if not isinstance(name, str):
            raise InputError(f"{place}: expected text as a name, found {name!r}")
        endless = isinstance(item, float) and not math.isfinite(item)
        if type(item) not in typing.get_args(Scalar) or endless:
            raise InputError(f"{place}: {name}: expected true, false, a number or text, found {item!r}")
    return dict(value)


def _typed(hint: Any, value: Any, *, place: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        words = [word for option in options for word in typing.get_args(option) if isinstance(word, str)]
        if value in words:  # Literal["default"], for example
            return value
        (hint,) = [option for option in options if typing.get_origin(option) is not typing.Literal]
    if hint == Scalars:
        return scalars(value, place=place)
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
