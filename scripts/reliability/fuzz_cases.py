"""What a parser is to a fuzzer, and the cases and oracles that several share."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import fuzz_mutations as mutations

Oracle = Callable[[Any], str | None]


@dataclass(frozen=True)
class Case:
    """An input: what is written or said, and whether it must be refused whatever else it is."""

    content: Any
    forbidden: str | None = None


@dataclass(frozen=True)
class Parser:
    """What is fed to a parser, and what must come of it.

    Attributes:
        name: for the table.
        weight: its share of the inputs.
        good: a content that is accepted.
        cases: makes a case of random choices.
        read: takes a content.
        wrong: says why a result should not have been accepted.
        words: of the command that reads a content too, None where none does.
    """

    name: str
    weight: int
    good: Any
    cases: Callable[[random.Random], Case]
    read: Callable[[Any], Any]
    wrong: Oracle
    words: Callable[[Any], list[str] | None] = lambda content: None


def json_cases(*trees: Any) -> Callable[[random.Random], Case]:
    """Mutations of JSON (and so YAML) files: of the tree, of a key, of the text."""

    def cases(rng: random.Random) -> Case:
        tree = rng.choice(trees)
        kind = rng.randrange(10)
        if kind == 0 and (doubled := mutations.doubled_key(rng, tree)):
            return Case(doubled[1].encode(), f"the key {doubled[0]!r} is there twice")
        if kind <= 2:
            return Case(mutations.mutated_text(rng, json.dumps(tree)))
        return Case(json.dumps(mutations.mutated_tree(rng, tree)).encode())

    return cases


def as_json(tree: Any) -> bytes:
    """A file of one tree."""
    return json.dumps(tree).encode()


def numbers(value: Any) -> Iterator[float]:
    """Every number inside a value."""
    if isinstance(value, dict):
        for child in value.values():
            yield from numbers(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from numbers(child)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def texts(value: Any) -> Iterator[str]:
    """Every text inside a value."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from texts(key)
            yield from texts(child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from texts(child)
    elif isinstance(value, str):
        yield value


def unusable(value: Any) -> str | None:
    """What no accepted setting may hold."""
    if any(not math.isfinite(number) or abs(number) > 3.5e38 for number in numbers(value)):
        return "a number that is not finite"
    if any("\0" in text or any("\ud800" <= c <= "\udfff" for c in text) for text in texts(value)):
        return "text that no file name and no tokenizer can hold"
    return None
