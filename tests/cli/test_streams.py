"""Standard streams that are closed, full or of another encoding, and what libraries write there."""

import logging
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest

from domino_jax.base.errors import InputError
from domino_jax.page.pictures import drawn

# Programs that replace what the command does.
OPENS_A_FILE = """
import os
from domino_jax import cli
cli.command = lambda: os._exit(7 if os.open(os.devnull, os.O_RDONLY) > 2 else 8)
cli.main()
"""
PRINTS_LETTERS = r"""
from domino_jax import cli
from domino_jax.cli import shared, verbs
def letters(**_):
    shared.results().print("\u00e9\u27e6\U0001f600")
    shared.echo("\u00e9\u27e6\U0001f600")
verbs.cli = letters
cli.main()
"""


def run(words: str, program: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Words of a shell; `$PROGRAM` among them is a program."""
    return subprocess.run(
        ["bash", "-c", words],
        env={**os.environ, "PROGRAM": program, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_no_file_takes_the_number_of_a_closed_stream(closed: str) -> None:
    """Or what a library writes to standard error would end in a checkpoint."""
    assert run(f'{sys.executable} -c "$PROGRAM" {closed}', OPENS_A_FILE).returncode == 7


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("config train.steps >&- 2>&- <&-", 0),
        ("config nope >&- 2>&- <&-", 2),
        ("config train.steps > /dev/full", 2),
        ("config nope 2> /dev/full", 2),
    ],
)
def test_a_stream_that_takes_nothing_leaves_the_exit_code(words: str, code: int) -> None:
    result = run(f"{sys.executable} -m domino_jax {words}")
    assert result.returncode == code and b"Traceback" not in result.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_letters_that_an_encoding_lacks_are_escaped(encoding: str) -> None:
    result = run(f'{sys.executable} -c "$PROGRAM"', PRINTS_LETTERS, PYTHONIOENCODING=encoding)
    assert result.returncode == 0, result.stderr
    table, line = result.stdout.splitlines()
    first = rb"\xe9" if encoding == "ascii" else b"\xe9"
    assert table == first + rb"\u27e6\U0001f600"
    # click takes ASCII for a mistake, and writes UTF-8.
    assert line in (table, "\u00e9\u27e6\U0001f600".encode())


def test_what_libraries_quote_is_escaped(
    domino, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)  # put back at the end
    factory = logging.getLogRecordFactory()
    try:
        assert domino("--version")[0] == 0
        logging.getLogger("library").warning("found %s\n\u202e", "\x1b[2J")
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == ["found \\x1b[2J\n\\u202e"]
    text = warnings.formatwarning("found \x1b[2J", UserWarning, "file.py", 1, "")
    assert r"found \x1b[2J" in text and "\x1b" not in text


def test_an_unknown_device_is_one_line(domino, monkeypatch: pytest.MonkeyPatch) -> None:
    """What JAX raises for a JAX_PLATFORMS or a driver that it cannot use."""

    def devices(**_: Any) -> None:
        raise RuntimeError("Unable to initialize backend 'nope': not in the list. (set JAX_PLATF")

    monkeypatch.setattr("domino_jax.cli.verbs.cli.callback", devices)
    code, out, log = domino()
    assert (code, out) == (2, "")
    assert log.startswith("error: Unable to initialize backend 'nope': ") and log.count("\n") == 1


def test_an_unknown_backend_of_matplotlib_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("MPLBACKEND", "nope")
    with pytest.raises(InputError, match=r"^MPLBACKEND: .*'nope' is not a valid value for backend"):
        drawn((), ())
