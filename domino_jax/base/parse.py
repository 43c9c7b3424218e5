"""JSON and YAML of somebody else, parsed within bounds.

A parser of somebody else's text may be made to take all memory, to recurse until it fails, or to
read what nobody meant: a key that is given twice, `1:30` as 90. So depth, length of numbers and
length of settings are bounded, and what is ambiguous is refused. No jax here.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable
from typing import Any

import yaml

from domino_jax.base.errors import InputError, require, shown

YAML_CHARACTERS = 2**20  # of settings, which people write; the parser takes seconds for as many
YAML_VALUES = 2**14  # each takes about a kilobyte while it is parsed
# Of a value of JSON in Python: `[[],[],...]` takes 20 to 60 times its characters.
CONTAINER_BYTES, STRING_BYTES = 240, 128
STRUCTURE_BYTES = 9 * 2**22  # of all lists, mappings and strings; an index of 140,000 tensors
ENTRIES = 2**19  # of all lists and mappings of a text, 40 bytes each
DEPTH = 64  # levels of mappings and lists
NUMBER_CHARACTERS = 64  # of a number as it is written


def parse_json(
    text: str | bytes, *, source: str | None, nonfinite: bool = False, entries: int = ENTRIES
) -> Any:
    """Parses JSON of somebody else, within bounds.

    Args:
        text: the JSON; bytes are UTF-8.
        source: where it comes from, for the message; None where the caller says so.
        nonfinite: take NaN and Infinity, which are not JSON but which Python writes.
        entries: of all lists and mappings, at most.
    Raises:
        InputError: not JSON, a key that is given twice in one object, a number beyond every float
            or of more than `NUMBER_CHARACTERS`, more than `DEPTH` levels, more than `entries`, or
            more lists, mappings and strings than `STRUCTURE_BYTES` hold.
    """
    where = "" if source is None else f"{source}: "
    too_deep = f"{where}more than {DEPTH} levels of lists and mappings"
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}not UTF-8") from error
    _check_values(text, where=where, entries=entries)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_doubles,
            parse_int=lambda text: int(_short(text)),
            parse_float=_number,
            parse_constant=float if nonfinite else _no_constant,
        )
    except RecursionError as error:  # in json's parser, before there is a value to look at
        raise InputError(too_deep) from error
    except ValueError as error:
        raise InputError(f"{where}not valid JSON: {error}") from error
    require(_is_within(value, DEPTH), too_deep)
    return value


def parse_yaml(text: str, *, source: str) -> Any:
    """Parses YAML of somebody else, within bounds.

    Read are mappings, lists, text, numbers, true, false and null. Numbers are decimal and dates are
    text, as in YAML 1.2: `010` and `1:30` are not 8 and 90.

    Raises:
        InputError: not YAML, a key that is given twice, an alias, a tag, a number of more than
            `NUMBER_CHARACTERS`, more than `DEPTH` levels, `YAML_VALUES` or `YAML_CHARACTERS`.
    """
    characters = f"{len(text)} characters of YAML, expected at most {YAML_CHARACTERS}"
    require(len(text) <= YAML_CHARACTERS, f"{source}: {characters}")
    try:
        return yaml.load(text, Loader=_BoundedLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(
            f"{source}: not valid YAML: {where}{error.problem or error.context}"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def _check_values(text: str, *, where: str, entries: int) -> None:
    """Refuses JSON whose values take much more memory than its text, before it is parsed."""
    lists, commas, quotes = text.count("[") + text.count("{"), text.count(","), text.count('"')
    if not _is_large(lists, quotes // 2) and commas < entries:
        return
    # Some of them are words of strings.
    text = text.replace("\\\\", "").replace('\\"', "")
    strings = text.count('"') // 2
    lists = commas = at = 0
    while at >= 0 and not _is_large(lists, strings):
        end = text.find('"', at)
        part = (at, end if end >= 0 else len(text))
        lists += text.count("[", *part) + text.count("{", *part)
        commas += text.count(",", *part)
        at = text.find('"', end + 1) + 1 or -1 if end >= 0 else -1
    require(
        not _is_large(lists, strings),
        f"{where}{lists} lists and mappings and {strings} strings, which take more than "
        f"{STRUCTURE_BYTES // 2**20} MiB",
    )
    require(commas < entries, f"{where}{commas} entries, expected at most {entries}")


def _is_large(lists: int, strings: int) -> bool:
    return lists * CONTAINER_BYTES + strings * STRING_BYTES > STRUCTURE_BYTES


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        ((twice, _),) = counts.most_common(1)
        raise ValueError(f"the key {shown(twice)} is given twice")
    return mapping


def _number(text: str) -> float:
    number = float(_short(text))
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond every float")
    return number


def _short(text: str) -> str:
    # Before it is converted, which takes long for many digits; no setting has as many.
    if len(text) > NUMBER_CHARACTERS:
        raise ValueError(
            f"a number of {len(text)} characters, expected at most {NUMBER_CHARACTERS}"
        )
    return text


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")


def _is_within(value: Any, levels: int) -> bool:
    """Whether lists and mappings lie in each other at most so many times."""
    if not isinstance(value, dict | list):
        return True
    items = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_within(item, levels - 1) for item in items)


class _BoundedLoader(yaml.SafeLoader):
    """The part of YAML that settings need; the rest costs memory or says what nobody meant."""

    depth = 0
    values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self.values += 1
        if self.values > YAML_VALUES:
            raise self._refusal(f"more than {YAML_VALUES} values", event)
        # Nine lists of nine aliases, each of the list before, stand for 9**9 values.
        if isinstance(event, yaml.AliasEvent):
            raise self._refusal("aliases (*name) are not read; write the value itself", event)
        if getattr(event, "tag", None) is not None:
            raise self._refusal(
                f"tags ({shown(event.tag)}) are not read; write the value alone", event
            )
        holder = isinstance(event, yaml.CollectionStartEvent)
        self.depth += holder
        if self.depth > DEPTH:
            raise self._refusal(f"more than {DEPTH} levels of lists and mappings", event)
        node = super().compose_node(parent, index)
        self.depth -= holder
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise self._refusal("a list or mapping as a key", key_node)
            if key in mapping:  # PyYAML would take the last of the two
                raise self._refusal(f"the key {shown(key)} is given twice", key_node)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping

    def construct_number(self, node: Any) -> int | float:
        if len(node.value) > NUMBER_CHARACTERS:
            found = f"a number of {len(node.value)} characters"
            raise self._refusal(f"{found}, expected at most {NUMBER_CHARACTERS}", node)
        if node.tag == f"{_TAG}int":
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)

    @staticmethod
    def _refusal(problem: str, node: Any) -> yaml.MarkedYAMLError:
        return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_TAG = "tag:yaml.org,2002:"
# What plain text stands for; YAML 1.1's own spellings, less octal, hexadecimal, sexagesimal numbers
# and dates.
_PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
    "int": r"[-+]?(?:0|[1-9][0-9_]*)",
    "float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
# Under None: whatever character a plain scalar begins with.
_BoundedLoader.yaml_implicit_resolvers = {
    None: [(f"{_TAG}{kind}", re.compile(f"(?:{spelling})$")) for kind, spelling in _PLAIN.items()]
}
for _kind in ("int", "float"):
    _BoundedLoader.add_constructor(f"{_TAG}{_kind}", _BoundedLoader.construct_number)
