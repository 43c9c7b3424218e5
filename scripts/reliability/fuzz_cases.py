"""What a parser is to a fuzzer, and the cases and oracles that several share."""

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutations as mutations


@dataclass(frozen=True)
class Case:
    """An input: its content, and why it must be refused whatever else it is."""

    content: Any
    forbidden: str | None = None


@dataclass(frozen=True)
class Inputs:
    """A content that is accepted, and cases made from it by random choices."""

    good: Any
    draw: Callable[[random.Random], Case]


@dataclass(frozen=True)
class Parser:
    """What is fed to a parser, and what must come of it.

    Attributes:
        name: for the table.
        weight: its share of the inputs.
        inputs: what it is fed.
        check: reads a content, written to a file where it is bytes; why what it accepted should
            not have been, None where it should.
        words: of the command that reads such a file too, or takes a text or words at its end.
    """

    name: str
    weight: int
    inputs: Inputs
    check: Callable[[Any], str | None]
    words: tuple[str | Path, ...] = ()


def json_inputs(*trees: Any) -> Inputs:
    """Mutations of JSON (and so YAML) files: of the tree, of a key, of the text."""

    def draw(rng: random.Random) -> Case:
        tree = rng.choice(trees)
        kind = rng.randrange(10)
        if kind == 0 and (doubled := mutations.doubled_key(rng, tree)):
            return Case(doubled[1].encode(), f"the key {doubled[0]!r} is there twice")
        if kind <= 2:
            return Case(mutations.mutated_text(rng, json.dumps(tree)))
        return Case(as_json(mutations.mutated_tree(rng, tree)))

    return Inputs(as_json(trees[0]), draw)


def as_json(tree: Any) -> bytes:
    """A file of one tree."""
    return json.dumps(tree).encode()


def leaves(value: Any) -> Iterator[Any]:
    """Every key, number and text inside a value."""
    if isinstance(value, dict):
        for item in value.items():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from leaves(child)
    else:
        yield value


def unusable(value: Any) -> str | None:
    """What no accepted setting may hold."""
    for leaf in leaves(value):
        if isinstance(leaf, str) and ("\0" in leaf or any("\ud800" <= c <= "\udfff" for c in leaf)):
            return "text that no file name and no tokenizer can hold"
        if isinstance(leaf, int | float) and not (math.isfinite(leaf) and abs(leaf) <= 3.5e38):
            return "a number that is not finite"
    return None
