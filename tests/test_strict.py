"""Mappings of plain values: what a field of type `Scalars` takes, and what it refuses in one line."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from domino_jax.strict import InputError, Scalars, from_tree, scalars


@dataclass(frozen=True)
class Section:
    options: Scalars = field(default_factory=dict)


def test_a_mapping_keeps_names_and_types() -> None:
    given = {"thinking": False, "budget": 0, "share": 0.5, "rate": "1e-3", "": "x"}
    found = from_tree(Section, {"options": given}, place="file").options
    assert [(name, type(value), value) for name, value in found.items()] == [
        (name, type(value), value) for name, value in given.items()
    ]
    assert found is not given, "what is changed later in the user's tree is not changed here"
    assert from_tree(Section, {}, place="file") == Section({})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "options: expected a mapping, found None"),
        ([1], r"options: expected a mapping, found \[1\]"),
        ("thinking", "options: expected a mapping, found 'thinking'"),
        ({1: 2}, "options: expected text as a name, found 1"),
        ({True: 2}, "options: expected text as a name, found True"),
        ({"a": None}, "options: a: expected true, false, a number or text, found None"),
        ({"a": [1]}, r"options: a: expected true, .*, found \[1\]"),
        ({"a": {}}, "options: a: expected true, .*, found {}"),
        ({"a": float("nan")}, "options: a: expected true, .*, found nan"),
        ({"a": float("-inf")}, "options: a: expected true, .*, found -inf"),
    ],
)
def test_a_mapping_refuses(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^file: {message}$"):
        from_tree(Section, {"options": value}, place="file")
    with pytest.raises(InputError, match=f"^{message}$"):
        scalars(value, place="options")
