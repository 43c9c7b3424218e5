"""Whatever a server does, it ends in a response within bounds or in one line with the address."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Event
from typing import Any

import pytest
from stand_in import NOT_FOUND, serving, speaking

from domino_jax.base.errors import InputError
from domino_jax.evaluation import responses
from domino_jax.evaluation.responses import base_url, count, fetch, find, json_of, mapping_of, need


def test_a_question_is_posted_and_a_response_read() -> None:
    asked = []

    def respond(path: str, question: Any) -> tuple[Any, ...]:
        asked.append((path, question))
        return 200, {"a": [1, 2]}

    with serving(respond) as url:
        assert json_of(f"{url}/x", 5.0, {"ids": [3]}) == {"a": [1, 2]}
        assert mapping_of(f"{url}/y", 5.0) == {"a": [1, 2]}
    assert asked == [("/x", {"ids": [3]}), ("/y", None)]


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (NOT_FOUND, '/x: status 404, \'{"detail": "Not Found"}\''),
        ((500, b"\xffout of memory\x1b[2J"), "/x: status 500, '\ufffdout of memory\\x1b[2J'"),
        ((200, b"<html>"), "/x: not valid JSON: "),
        ((200, b'{"a": 1, "a": 2}'), "/x: not valid JSON: the key 'a' is given twice"),
    ],
)
def test_what_is_no_json_is_one_line(response: tuple[Any, ...], message: str) -> None:
    with serving(lambda *_: response) as url:
        with pytest.raises(InputError) as refused:
            json_of(f"{url}/x", 5.0)
        assert not mapping_of(f"{url}/x", 5.0) or response[1] == b'{"a": 1, "a": 2}'
    assert str(refused.value).startswith(f"{url}{message}") and "\n" not in str(refused.value)


def test_no_redirect_is_followed() -> None:
    visited = []

    def elsewhere(path: str, _: Any) -> tuple[Any, ...]:
        visited.append(path)
        return 200, {}

    with serving(elsewhere) as other, serving(lambda *_: (307, {}, f"{other}/x")) as url:
        with pytest.raises(InputError, match=f"{url}/x: status 307"):
            json_of(f"{url}/x", 5.0, {"prompt": [1]})
        assert mapping_of(f"{url}/x", 5.0) == {}
    assert not visited


def test_who_hangs_is_left() -> None:
    ended = Event()

    def hang(*_: Any) -> tuple[Any, ...]:
        ended.wait(30)
        return 200, {}

    with serving(hang) as url:
        began = time.monotonic()
        with pytest.raises(InputError, match=f"{url}/x: no response within 0.2 seconds"):
            fetch(f"{url}/x", 0.2)
        assert time.monotonic() - began < 5
        ended.set()


def test_who_sends_a_byte_now_and_then_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece comes within the time of a piece, and there is no end."""

    def piece(*_: Any) -> bytes:
        time.sleep(0.05)
        return b" "

    monkeypatch.setattr("http.client.HTTPResponse.read1", piece)
    with (
        serving(lambda *_: (200, {})) as url,
        pytest.raises(InputError, match=r"no response within .* seconds"),
    ):
        fetch(f"{url}/x", 0.2)


def test_who_never_ends_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "RESPONSE_BYTES", 1000)
    with (
        serving(lambda *_: (200, b" " * 1001)) as url,
        pytest.raises(InputError, match=f"{url}/x: more than 1000 bytes"),
    ):
        fetch(f"{url}/x", 5.0)


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# What a server sends without end: once, then again and again.
ENDLESS = {
    "status line": (b"HTTP/1.1 200 O", b"K"),
    "header": (OK + b"Name: a", b"b"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body without a length": (OK + b"\r\n", b" "),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"1;", b"a"),
    "chunks with extensions": (CHUNKED, b"1;a=b\r\n \r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"Name: a\r\n"),
}
LINES = ("status line", "header", "chunk size")  # of which http.client bounds each
TLS_RECORD = b"\x16\x03\x03\x40\x00"  # the head of a handshake's record of 16 KiB


def again(first: bytes, then: bytes, count: int) -> Iterator[bytes]:
    yield first
    yield from itertools.repeat(then, count)


def refused(address: str, timeout: float) -> str:
    """The message of an exchange that ends in time, and whose thread ends too."""
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        fetch(address, timeout)
    assert time.monotonic() - began < 5
    for thread in threading.enumerate():
        if thread.name == f"exchange with {address}":
            thread.join(5)
            assert not thread.is_alive()
    return str(error.value).removeprefix(f"{address}: ")


@pytest.mark.parametrize(
    ("scheme", "first", "then"),
    [
        *(pytest.param("http", *words, id=name) for name, words in ENDLESS.items()),
        pytest.param("https", b"", b"", id="TLS handshake, silent"),
        pytest.param("https", TLS_RECORD, b"\2", id="TLS handshake, byte by byte"),
    ],
)
def test_the_limit_covers_the_whole_exchange(scheme: str, first: bytes, then: bytes) -> None:
    """Each read of the socket is within the limit; 10 seconds of them are not."""
    with speaking(again(first, then, 500), pause=0.02) as host:
        assert refused(f"{scheme}://{host}/x", 0.3) == "no response within 0.3 seconds"


@pytest.mark.parametrize("name", [name for name in ENDLESS if name not in LINES])
def test_the_size_is_of_the_whole_exchange(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "RESPONSE_BYTES", 20_000)
    first, then = ENDLESS[name]
    with speaking(again(first, then * 100, 1000), pause=0) as host:
        assert refused(f"http://{host}/x", 5.0) == "more than 20000 bytes"


def test_the_limit_covers_all_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        address = listener.getsockname()
        for _ in range(2):  # nobody accepts them: further ones wait
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        found = (socket.AF_INET, socket.SOCK_STREAM, 0, "", address)
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [found] * 20)
        monkeypatch.setenv("no_proxy", "host")
        with pytest.raises(InputError, match=r"host:1/x: no response within 0.3 seconds"):
            began = time.monotonic()
            fetch("http://host:1/x", 0.3)
        assert time.monotonic() - began < 4
        monkeypatch.undo()


def test_an_exchange_that_was_left_does_not_keep_the_process() -> None:
    program = """
import socket, time
from domino_jax.evaluation.responses import fetch
socket.getaddrinfo = lambda *_, **__: time.sleep(60)
try:
    fetch("http://host/x", 0.1)
except ValueError as error:
    print(error)
"""
    words = [sys.executable, "-c", program]
    environment = {**os.environ, "no_proxy": "host"}
    result = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=50, check=True
    )
    assert result.stdout == "http://host/x: no response within 0.1 seconds\n"


def test_a_body_that_is_cut_off_is_refused() -> None:
    """A counter of `/metrics` without its last digits is another number."""
    words = OK + b"Content-Length: 9\r\n\r\nabc"
    with speaking([words], pause=0) as host:
        message = refused(f"http://{host}/x", 5.0)
    assert message == "IncompleteRead(3 bytes read, 6 more expected)"


def test_who_is_not_there_or_speaks_something_else_is_one_line() -> None:
    with serving(lambda *_: (200, {})) as url:
        pass
    with pytest.raises(InputError, match=f"{url}/x: .*refused"):
        fetch(f"{url}/x", 5.0)
    with pytest.raises(InputError, match=r"http://a\.\.b/x: "):
        fetch("http://a..b/x", 5.0)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://localhost:30000", "http://localhost:30000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://host/behind/a/proxy/", "https://host/behind/a/proxy"),
        ("http://[::1]:80", "http://[::1]:80"),
    ],
)
def test_an_address_is_taken_with_or_without_its_version(url: str, base: str) -> None:
    assert base_url(url) == base


@pytest.mark.parametrize(
    "url",
    [
        "localhost:30000",
        "file:///etc/passwd",
        "ftp://host",
        "http://",
        "http://host:port",
        "http://name:word@host",
        "http://host/?a=b",
        "http://host/a b",
        "http://host\n",
        "",
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected the address of a server, http://HOST:PORT"):
        base_url(url)


def test_a_response_is_read_by_path_and_type() -> None:
    record = {"a": [{"b": 3}], "c": True, "d": -1}
    assert find(record, "a", 0, "b") == need(record, "a", 0, "b", kind=int, source="x") == 3
    assert find(record, "a", 1, "b") is None and find(record, "a", "b") is None
    assert find([], "a") is None and find(None, 0) is None
    assert count(record, "a", 0, "b", source="x") == 3
    with pytest.raises(InputError, match=r"x: expected str as a.0.b, found \{'a'"):
        need(record, "a", 0, "b", kind=str, source="x")
    with pytest.raises(InputError, match="x: expected int as c"):
        count(record, "c", source="x")
    with pytest.raises(InputError, match="x: expected a count as d, found -1"):
        count(record, "d", source="x")
