"""A setting is worth what its reader understands, so every key says what it means and may be.

It stands where the key does, as the metadata of its field: the check of a section, `domino config`
and the message of an error cannot tell different stories.

    steps: int | None = key(None, "length of the run", unit="optimiser steps", least=1)
    loss.decay_ratio must lie in 0..1, found 2
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from domino_jax.base.errors import Scalars, require, shown
from domino_jax.config.sizes import SIZE_LIMIT

_KEY = "key"
REQUIRED = object()
# Bounds that several keys share.
COUNT: dict[str, Any] = {"least": 1, "below": 2**31}  # counted in int32: steps, rows, devices
LENGTH: dict[str, Any] = {"least": 1, "below": 2**24}  # the side of an array
SIZE: dict[str, Any] = {"least": 1, "most": SIZE_LIMIT}
INDEX: dict[str, Any] = {"least": 0, "most": SIZE_LIMIT}
SHARE: dict[str, Any] = {"least": 0, "most": 1}
_TYPES: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a key means and what its value may be.

    Attributes:
        meaning: one sentence without its end.
        unit: of a number.
        least: the smallest number; of a list, the smallest of its entries.
        above: what numbers must exceed.
        most: the largest number.
        below: what numbers must stay below.
        special: numbers outside the bounds that stand for something, as `meaning` says.
        choices: the texts that are known.
    """

    meaning: str
    unit: str = ""
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    special: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def bounds(self) -> str:
        """What a value may be, formatted; empty where only its type counts.

        >>> Key(meaning="a share", least=0, most=1).bounds
        'in 0..1'
        >>> Key(meaning="a rate", above=0).bounds
        'above 0'
        """
        words = [f"{number:g}" for number in self.special]
        ends = {
            "at least": self.least,
            "above": self.above,
            "at most": self.most,
            "below": self.below,
        }
        given = [f"{word} {_number(end)}" for word, end in ends.items() if math.isfinite(end)]
        if math.isfinite(self.least) and math.isfinite(self.most):
            given = [f"in {_number(self.least)}..{_number(self.most)}"]
        if given:
            words.append(" and ".join(given))
        if self.choices:
            words.append(f"one of {', '.join(self.choices)}")
        return " or ".join(words)

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type lies within the bounds; null always does."""
        if isinstance(value, tuple):
            return all(self.allows(entry) for entry in value)
        if isinstance(value, str):
            return not self.choices or value in self.choices
        if value is None or isinstance(value, bool) or not isinstance(value, int | float):
            return True
        # Both kinds of bounds: what a key does not give is infinite and excludes nothing.
        within = self.least <= value <= self.most and self.above < value < self.below
        return within or value in self.special


def _number(value: float) -> str:
    """A limit as a person reads it."""
    # 2**31 reads as the limit that it is, 2147483648 as a number that somebody chose.
    power = math.log2(value) if value >= 2**20 else 0.5
    return f"2**{power:.0f}" if power.is_integer() else f"{value:g}"


def key(default: Any, meaning: str, **bounds: Any) -> Any:
    """A field of a section.

    Args:
        default: `REQUIRED` for none; a mapping is made anew for each section.
        meaning: one sentence without its end.
        bounds: the other fields of `Key`.
    """
    metadata = {_KEY: Key(meaning=meaning, **bounds)}
    if default is REQUIRED:
        return dataclasses.field(metadata=metadata)
    if isinstance(default, dict):
        # No mapping has a hash, and a section is to have one.
        return dataclasses.field(default_factory=dict, hash=False, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Fields made by `key`, each within its bounds, and other sections."""

    def __post_init__(self) -> None:
        """Refuses the first value out of its bounds."""
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            known = field.metadata.get(_KEY)
            value = getattr(self, field.name)
            # A section inside a section has no key: it has checked itself.
            if known is not None:
                may_be_null = types.NoneType in typing.get_args(hints[field.name])
                expected = f"{known.bounds}{' or null' if may_be_null else ''}"
                # As a YAML file has it, not as a tuple of Python.
                found = shown(list(value) if isinstance(value, tuple) else value)
                require(known.allows(value), f"{field.name} must be {expected}, found {found}")


@dataclass(frozen=True)
class Described:
    """A key as `domino config` prints it: its dotted name, type, default as YAML, and meaning."""

    name: str
    kind: str
    default: str
    key: Key


def described(kind: type, prefix: str = "") -> Iterator[Described]:
    """Every key of a configuration and its sections, in the order of a file."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            yield from described(typing.cast(type, hint), f"{name}.")
        else:
            yield Described(name, _words(hint), _default(field), field.metadata[_KEY])


def _words(hint: Any) -> str:
    """The type of a value as a user names it."""
    if hint == Scalars:
        return "mapping of plain values"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_words(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"list of {_words(typing.get_args(hint)[0])}s"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return "null" if hint is types.NoneType else _TYPES[hint]


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return "{}"
    if field.default is dataclasses.MISSING:
        return "required"
    # JSON's null, true, false and numbers are YAML's.
    return field.default if isinstance(field.default, str) else json.dumps(field.default)
