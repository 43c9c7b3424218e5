"""Memory of readers: at most 64 MiB beyond what they give, whatever the file."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from domino_jax.base.errors import InputError
from domino_jax.base.files import LINE_BYTES, TEXT_BYTES, read_json
from domino_jax.base.parse import ENTRIES, parse_json, parse_yaml

MIB = 2**20
# Prints the MiB by which a reader grew its process, and what it found. Each line of input, a reader
# and a path, is read in a new process.
MEASURE = """
import os, re, sys
from pathlib import Path
from domino_jax.base.errors import InputError
from domino_jax.base.files import read_json, read_own_json, read_text
from domino_jax.base.parse import parse_yaml
from domino_jax.data.forms import read_conversations
from domino_jax.datagen.batch_log import BatchLog
from domino_jax.formats.safetensors import open_safetensors
from domino_jax.training.log import read_metrics, read_timing

def partial(path):
    with BatchLog(path, lambda record: None, kind="an answer", generator={}):
        pass

READERS = {
    "conversations": read_conversations, "json": read_json, "partial": partial,
    "metrics": lambda path: read_metrics(path.parent),
    "timing": lambda path: list(read_timing(path.parent)),
    "own": lambda path: read_own_json(path, remedy="x"),
    "tensors": lambda path: open_safetensors(path.parent),
    "yaml": lambda path: parse_yaml(read_text(path), source="x"),
}

def mib(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def measure(reader, path):
    # The largest size so far is that of the process that started this one.
    Path("/proc/self/clear_refs").write_text("5")
    before = mib("VmRSS")
    try:
        found = READERS[reader](Path(path))
        words = f"{len(found.bad_lines)} bad lines" if reader == "conversations" else "read"
    except InputError as error:
        words = str(error)
    print(f"{mib('VmHWM') - before:.0f} {words}", flush=True)

for line in sys.stdin:
    if os.fork() == 0:
        measure(*line.split())
        os._exit(0)
    os.wait()
"""
GOOD = b'{"messages": [{"role": "user", "content": "Hi"}]}\n'


def repeated(part: bytes, size: int) -> bytes:
    return part * (size // len(part))


def wide(size: int) -> bytes:
    return b"{" + b",".join(b'"%07d":1' % number for number in range(size // 12)) + b"}"


def headed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


LINE, FILE = LINE_BYTES - 99, TEXT_BYTES - 99
SHAPES: dict[str, tuple[str, str, Callable[[], bytes], str]] = {
    "bad lines": ("conversations", "a.jsonl.gz", lambda: GOOD + b"x\n" * 100_000, "100000 bad"),
    "other bad lines": (
        *("conversations", "a.jsonl"),
        lambda: GOOD + b"".join(b'{"%d": []}\n' % n for n in range(50_000)),
        "50000 bad",
    ),
    "empty lines": ("conversations", "a.jsonl.gz", lambda: GOOD + b"\n" * 2_000_000, "0 bad lines"),
    "zeros": ("conversations", "a.jsonl.gz", lambda: GOOD + bytes(80 * MIB), "1 bad"),
    "lists": (
        *("conversations", "a.jsonl"),
        lambda: GOOD + b"[" + repeated(b"[],", LINE) + b"[]]\n",
        "1 bad",
    ),
    "mappings": (
        *("conversations", "a.jsonl"),
        lambda: GOOD + b"[" + repeated(b'{"":0},', LINE) + b"0]\n",
        "1 bad",
    ),
    "keys": ("conversations", "a.jsonl", lambda: GOOD + wide(LINE) + b"\n", "1 bad"),
    "keys that fit": ("conversations", "a.jsonl", lambda: GOOD + wide(2 * MIB) + b"\n", "1 bad"),
    "wide characters": (
        *("conversations", "a.jsonl"),
        lambda: GOOD + ('["' + "🦊" + "a" * (LINE - 9) + '"]\n').encode(),
        "1 bad",
    ),
    "levels": ("conversations", "a.jsonl", lambda: GOOD + b"[" * LINE + b"\n", "1 bad"),
    "numbers": (
        *("conversations", "a.jsonl"),
        lambda: GOOD + b"[" + repeated(b"3000,", 5 * ENTRIES - 9) + b"1]\n",
        "1 bad",
    ),
    "a manifest": (
        *("json", "manifest.json"),
        lambda: b"[" + repeated(b"[],", 64 * MIB) + b"[]]",
        "bytes, expected at most",
    ),
    "lists of a file": (
        *("json", "config.json"),
        lambda: b"[" + repeated(b"[],", FILE) + b"[]]",
        "lists and mappings",
    ),
    "keys of a file": ("json", "config.json", lambda: wide(FILE), "strings, which take more"),
    "numbers of a file": (
        *("json", "config.json"),
        lambda: b"[" + repeated(b"3000,", FILE) + b"1]",
        "entries, expected at most",
    ),
    "wide characters of a file": (
        *("json", "config.json"),
        lambda: ('["' + "🦊" + "a" * (FILE - 99) + '"]').encode(),
        "not all ASCII",
    ),
    "numbers of an own file": (
        *("own", "evaluation.json"),
        lambda: b'{"a":[' + repeated(b"3000,", FILE - 99) + b"1]}",
        "entries, expected at most",
    ),
    "a header": ("tensors", "model.safetensors", lambda: headed(wide(FILE)), "strings, which take"),
    "a long header": (
        *("tensors", "model.safetensors"),
        lambda: headed(b"{}" + b" " * (90 * MIB)),
        "bytes, expected at most",
    ),
    "settings": (
        *("yaml", "config.yaml"),
        lambda: b"[" + repeated(b"[],", MIB - 9) + b"1]",
        "more than 16384 values",
    ),
    "unfinished answers": (
        *("partial", "a.partial"),
        lambda: repeated(b"x" * 999 + b"\n", 80 * MIB),
        "not unfinished answers",
    ),
    "a log": ("metrics", "metrics.jsonl", lambda: bytes(80 * MIB), "metrics.jsonl:1: more than"),
    "times": ("timing", "timing.jsonl", lambda: repeated(b"x" * 99 + b"\n", 8 * MIB), "read"),
}


@pytest.fixture(scope="module")
def measured() -> Iterator[Callable[[str, Path], str]]:
    """What `MEASURE` prints of a reader and a path."""
    command = [sys.executable, "-c", MEASURE]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdin is not None and process.stdout is not None
        asked, said = process.stdin, process.stdout

        def measure(reader: str, path: Path) -> str:
            print(reader, path, file=asked, flush=True)
            return said.readline()

        yield measure


@pytest.mark.parametrize(("reader", "name", "content", "words"), SHAPES.values(), ids=SHAPES)
def test_a_reader_takes_64_mib_at_most(
    reader: str,
    name: str,
    content: Callable[[], bytes],
    words: str,
    tmp_path: Path,
    measured: Callable[[str, Path], str],
) -> None:
    path = tmp_path / name
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(content())
    else:
        path.write_bytes(content())
    grown, _, found = measured(reader, path).partition(" ")
    assert words in found and int(grown) <= 64, (grown, found)


def test_words_are_no_values() -> None:
    text = '[{,"' * 2**17
    assert parse_json(json.dumps([text, '\\"', "\\"]), source=None) == [text, '\\"', "\\"]
    numbers = list(range(ENTRIES))
    assert parse_json(json.dumps(numbers), source=None) == numbers
    with pytest.raises(InputError, match=f"x: {ENTRIES} entries, expected at most {ENTRIES}"):
        parse_json(json.dumps([*numbers, 1]), source="x")
    assert len(parse_json(json.dumps([*numbers, 1]), source="x", entries=2**20)) == ENTRIES + 1
    # An index of 91,000 tensors, as the largest published models have.
    index = {f"model.layers.{n}.weight": f"model-{n % 163}.safetensors" for n in range(91_000)}
    assert parse_json(json.dumps(index), source=None) == index


def test_settings_of_many_values_are_refused() -> None:
    assert len(parse_yaml(f"[{'1, ' * 9999}1]", source="x")) == 10_000
    with pytest.raises(InputError, match=r"x: not valid YAML: line 1, .* more than 16384 values"):
        parse_yaml(f"[{'1, ' * 20_000}1]", source="x")


def test_read_json_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('{"ä": "🦊"}'.encode())
    assert read_json(tmp_path / "a.json") == {"ä": "🦊"}
    for encoding in ("utf-16", "utf-32", "latin-1"):
        content = '{"ä": 1}'.encode(encoding)
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(InputError, match="not UTF-8"):
            read_json(tmp_path / "a.json")
        with pytest.raises(InputError, match=r"^not UTF-8$"):
            parse_json(content, source=None)
