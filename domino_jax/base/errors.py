"""Mappings of a user's file become frozen dataclasses, strictly: every error names the place.

A misspelt key that is passed over, or "1e-3" that stays text, changes a run without a word. So what
is not a field in its type is refused, in one line that says where it stands. No jax here.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from domino_jax.base.escapes import printable

T = TypeVar("T")
Scalar = bool | int | float | str
# Settings whose names somebody else defines, a chat template for example.
Scalars = Mapping[str, Scalar]

LINE_CHARACTERS = 490  # of a message; with "error: " before it, a line of less than 500
SHOWN_CHARACTERS = 100  # of a value inside a message
# Every number of a configuration ends as one on a device.
FLOAT32_SMALLEST = 2.0**-126
FLOAT32_LARGEST = (2 - 2.0**-23) * 2.0**127


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message names the place, what was found, what was expected and what to do. It is one line of
    at most `LINE_CHARACTERS` whatever it quotes, see `one_line`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Interrupted(Exception):
    """A training run stopped on request and saved its state; the same command resumes it."""


class Diverged(Exception):
    """Too many consecutive updates, the parameters, or the logits of a rollout were not finite.

    The run stopped; its checkpoints are finite.
    """


class Untrained(Exception):
    """No step of a finished training run updated the draft; its checkpoints are the initial one."""


def one_line(text: str) -> str:
    """Text as one harmless line: control characters escaped, the middle of a long one left out.

    The place stands at the beginning of a message and the remedy at its end.
    """
    # What is left out below is not looked at: a message may quote megabytes.
    if len(text) > 2 * LINE_CHARACTERS:
        text = f"{text[:LINE_CHARACTERS]}{text[-LINE_CHARACTERS:]}"
    text = printable(text)
    if len(text) <= LINE_CHARACTERS:
        return text
    end = LINE_CHARACTERS // 3
    return f"{text[: LINE_CHARACTERS - end - 5]} ... {text[-end:]}"


def shown(value: Any) -> str:
    """A value as a message quotes it: its `repr`, the middle left out where it is long."""
    text = repr(value)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[: SHOWN_CHARACTERS - 33]}...{text[-30:]}"


def text_problem(text: str) -> str | None:
    """Why text can be neither a path nor words for a tokenizer, None if it can.

    It holds a NUL, or half a surrogate pair.
    """
    if "\0" in text:
        return "holds a NUL character"
    halves = any("\ud800" <= c <= "\udfff" for c in text)
    return "is not valid Unicode" if halves else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the known name that is nearest to a misspelt one, "" where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def require(holds: bool, message: str) -> None:
    """Raises `InputError` with the message unless the condition holds."""
    if not holds:
        raise InputError(message)


def from_dict(kind: type[T], tree: Mapping[str, Any], *, source: str) -> T:
    """Builds a dataclass from nested mappings, strictly.

    Args:
        kind: the dataclass.
        tree: mapping of its fields, a dataclass among them as a mapping or made; a float may be an
            integer or a string such as "1e-3", which YAML reads as text. A field of type `Scalars`
            takes a mapping, see `scalars`.
        source: where the mapping comes from, for messages.
    Raises:
        InputError: unknown or missing keys, wrong types, or a value that the dataclass refuses.
    """
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in fields:
            remedy = did_you_mean(str(key), fields) or f"known: {', '.join(fields)}"
            raise InputError(f"{source}: unknown key {shown(key)}; {remedy}")
        values[key] = _typed(hints[key], value, source=f"{source}: {key}")
    none = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [name for name, f in fields.items() if (f.default, f.default_factory) == none]
    missing = [name for name in needed if name not in values]
    require(not missing, f"{source}: missing {', '.join(missing)}")
    # A dataclass checks its values without knowing where they stand.
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def scalars(value: Any, *, source: str) -> dict[str, Scalar]:
    """A mapping from names to plain values, each in the type it was written in.

    Only who reads a name knows its type, so nothing is converted: "1e-3", which YAML reads as text,
    stays text.

    Raises:
        InputError: not a mapping, a name that is not text, or a value that is none of true, false,
            a finite number and text.
    """
    require(isinstance(value, dict), f"{source}: expected a mapping, found {shown(value)}")
    for name, item in value.items():
        named = isinstance(name, str)
        require(named, f"{source}: expected text as a name, found {shown(name)}")
        # Not `abs(item) >= 2**63`, which is false of NaN.
        endless = isinstance(item, int | float) and not abs(item) < 2**63
        if type(item) not in typing.get_args(Scalar) or endless:
            raise InputError(
                f"{source}: {name}: expected true, false, a number or text, found {shown(item)}"
            )
        _check_text(name, source=source)
        _check_text(item, source=source)
    return dict(value)


def _check_text(value: Any, *, source: str) -> None:
    problem = text_problem(value) if isinstance(value, str) else None
    if problem:
        raise InputError(f"{source}: {shown(value)} {problem}")


def _typed(hint: Any, value: Any, *, source: str) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        options = [option for option in typing.get_args(hint) if option is not types.NoneType]
        if dataclasses.is_dataclass(value) and type(value) in options:
            return value
        literals = [option for option in options if typing.get_origin(option) is typing.Literal]
        if any(value in typing.get_args(literal) for literal in literals):
            return value  # of Literal["default"], for example
        (hint,) = [option for option in options if option not in literals]
    if hint == Scalars:
        return scalars(value, source=source)
    if dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{source}: expected a mapping, found {shown(value)}")
        return from_dict(typing.cast(type, hint), value, source=source)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{source}: expected a list, found {shown(value)}")
        return tuple(_typed(typing.get_args(hint)[0], item, source=source) for item in value)
    if hint is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # not a number, or an integer beyond every float
            number = math.nan
        if number == 0 or FLOAT32_SMALLEST <= abs(number) <= FLOAT32_LARGEST:
            return number
        if math.isfinite(number):
            raise InputError(f"{source}: {shown(value)} is not a number that float32 holds")
    elif type(value) is hint:
        _check_text(value, source=source)
        return value
    raise InputError(f"{source}: expected {hint.__name__}, found {shown(value)}")
