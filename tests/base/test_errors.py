"""Mappings of plain values: what a field of type `Scalars` takes, and refuses in one line."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from domino_jax.base.errors import LINE_CHARACTERS, InputError, Scalars, from_dict, scalars, shown


@dataclass(frozen=True)
class Section:
    options: Scalars = field(default_factory=dict)


def test_a_mapping_keeps_names_and_types() -> None:
    given = {"thinking": False, "budget": 0, "share": 0.5, "rate": "1e-3", "": "x"}
    found = from_dict(Section, {"options": given}, source="file").options
    assert [(name, type(value), value) for name, value in found.items()] == [
        (name, type(value), value) for name, value in given.items()
    ]
    assert found is not given, "what is changed later in the user's tree is not changed here"
    assert from_dict(Section, {}, source="file") == Section({})


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
        ({"a": 2**63}, "options: a: expected true, .*, found 9223372036854775808"),
        ({"a": "x\0"}, r"options: 'x\\x00' holds a NUL character"),
        ({"\ud800": 1}, r"options: '\\ud800' is not valid Unicode"),
    ],
)
def test_a_mapping_refuses(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^file: {message}$"):
        from_dict(Section, {"options": value}, source="file")
    with pytest.raises(InputError, match=f"^{message}$"):
        scalars(value, source="options")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("run.yaml: seed: bad", "run.yaml: seed: bad"),
        ("a\nb\x1b[3m\udcff\u202e", r"a\nb\x1b[3m\udcff\u202e"),
        ("x" * LINE_CHARACTERS, "x" * LINE_CHARACTERS),
    ],
)
def test_a_message_is_one_harmless_line(message: str, line: str) -> None:
    assert str(InputError(message)) == line


@pytest.mark.parametrize("middle", ["y" * 10**6, "\n" * 10**6, "\U0001f600" * 1000])
def test_a_long_message_keeps_its_place_and_its_remedy(middle: str) -> None:
    line = str(InputError(f"run.yaml: {middle}; remove it"))
    assert line.startswith("run.yaml: ") and line.endswith("; remove it") and " ... " in line
    assert len(line) <= LINE_CHARACTERS and line.isprintable()


def test_a_long_value_is_shown_in_part() -> None:
    assert shown("ab") == "'ab'" and shown([1, None]) == "[1, None]"
    for value in (
        "x" * 10**7,
        list(range(10**6)),
        {i: [i] * 100 for i in range(100)},
        10**4000,
        [[[[[[["x"] * 99]]]]]] * 99,
    ):
        assert 0 < len(shown(value)) <= 100


def test_a_number_that_float32_does_not_hold_is_refused() -> None:
    @dataclass(frozen=True)
    class Rate:
        rate: float

    assert from_dict(Rate, {"rate": 0}, source="file") == Rate(0.0) and from_dict(
        Rate, {"rate": "1e38"}, source="file"
    )
    for value in (1e39, "1e-39", -1e300):
        with pytest.raises(InputError, match=r"file: rate: .* is not a number that float32 holds"):
            from_dict(Rate, {"rate": value}, source="file")
