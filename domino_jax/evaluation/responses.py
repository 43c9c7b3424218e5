"""JSON responses of servers, bounded in time and size; a fault is one line with the address.

A socket's own limit restarts with every byte, and a header or a chunk takes as many reads as the
server likes. So a thread of its own runs the whole exchange, from the look-up of the name to the
last trailer, and the caller waits for it:

    fetch                       _exchange, a daemon thread
    waits `timeout` seconds     connects, sends, reads; every read of the socket checks time and
                                bytes, so an abandoned thread ends by itself
"""

import http.client
import io
import json
import queue
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from domino_jax.base.errors import InputError, shown
from domino_jax.base.parse import parse_json

TIMEOUT_SECONDS = 600.0  # for a response: a long answer takes minutes on a slow machine
RESPONSE_BYTES = 2**24  # headers included; more than any answer in JSON


def base_url(url: str) -> str:
    """The address that paths of an API are put behind."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:  # a port that is no number, for example
        host = None
    plain = url.isascii() and url.isprintable() and not set(" @?#") & set(url)
    if not host or not plain or parts.scheme not in ("http", "https"):
        raise InputError(f"{shown(url)}: expected the address of a server, http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def mapping_of(address: str, timeout: float) -> Mapping[str, Any]:
    """A mapping that some servers have at an address; empty of others."""
    status, said = fetch(address, timeout)
    # Whatever else stands there is somebody else's page.
    with suppress(InputError):
        found = parse_json(said, source=None, nonfinite=True)
        if status == 200 and isinstance(found, dict):
            return found
    return {}


def json_of(address: str, timeout: float, question: Mapping[str, Any] | None = None) -> Any:
    """The JSON that a server responds with."""
    status, said = fetch(address, timeout, question)
    if status != 200:
        raise InputError(f"{address}: status {status}, {shown(said.decode('utf-8', 'replace'))}")
    return parse_json(said, source=address, nonfinite=True)


def fetch(
    address: str, timeout: float, question: Mapping[str, Any] | None = None
) -> tuple[int, bytes]:
    """Status and body of a response, whatever the status.

    Args:
        address: of the response.
        timeout: seconds for the whole exchange.
        question: is posted as JSON; None sends a GET request.
    Raises:
        InputError: no response, not a whole one in time, or more than `RESPONSE_BYTES`.
    """
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    ended: queue.SimpleQueue[tuple[int, bytes] | Exception] = queue.SimpleQueue()

    def exchange() -> None:
        try:
            ended.put(_exchange(request, timeout))
        except Exception as error:  # raised by the caller
            ended.put(error)

    # A daemon: nothing stops the look-up of a name, and the process must be able to exit.
    threading.Thread(target=exchange, name=f"exchange with {address}", daemon=True).start()
    try:
        result = ended.get(timeout=timeout)
    except queue.Empty:
        result = TimeoutError()
    if isinstance(result, InputError | OSError | http.client.HTTPException | UnicodeError):
        # urllib wraps what goes wrong before there is a response.
        reason = result.reason if isinstance(result, urllib.error.URLError) else result
        if isinstance(reason, TimeoutError):
            reason = f"no response within {timeout:g} seconds"
        raise InputError(f"{address}: {str(reason) or type(reason).__name__}") from result
    if isinstance(result, Exception):
        raise result
    return result


def _exchange(request: urllib.request.Request, timeout: float) -> tuple[int, bytes]:
    """Status and body; the errors are those of urllib and of `_Received`."""
    body = bytearray()
    opener = urllib.request.build_opener(_AsAnswered, _Bounded)
    with opener.open(request, timeout=timeout) as response:
        while piece := response.read1(2**16):
            body += piece
        # `read1` takes the end of the connection for the end of the body.
        if response.length:
            raise http.client.IncompleteRead(bytes(body), response.length)
        return response.status, bytes(body)


class _Received(io.RawIOBase):
    """The bytes of a response: at most `RESPONSE_BYTES`, within the socket's own limit of time."""

    def __init__(self, sock: socket.socket) -> None:
        self._raw = sock.makefile("rb", buffering=0)
        self._left = RESPONSE_BYTES
        self._ends = time.monotonic() + (sock.gettimeout() or TIMEOUT_SECONDS)

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Reads what the socket has.

        Raises:
            TimeoutError: too late.
            HTTPException: too many bytes. Not an InputError: http.client takes a ValueError among
                chunks for a bad size.
        """
        count = self._raw.readinto(buffer)
        if time.monotonic() > self._ends:
            raise TimeoutError
        self._left -= count or 0
        if self._left < 0:
            raise http.client.HTTPException(f"more than {RESPONSE_BYTES} bytes")
        return count

    def close(self) -> None:
        """Closes the socket with it."""
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response read through `_Received`: status, headers, chunk sizes and trailers included."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Received(sock))


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Bounded(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens http and https addresses with such responses."""

    def http_open(self, request: Any) -> Any:
        """The response."""
        return self.do_open(_Connection, request)

    def https_open(self, request: Any) -> Any:
        """The response."""
        return self.do_open(_SecureConnection, request)


class _AsAnswered(urllib.request.HTTPErrorProcessor):
    """Hands on each response as it is.

    So no redirect is followed: prompts go where the user said, and nowhere else.
    """

    def http_response(self, request: Any, response: Any) -> Any:
        """The response, which urllib would follow elsewhere or raise."""
        return response

    https_response = http_response


def find(record: Any, *path: str | int) -> Any:
    """What stands at a path of keys and places in a response; None where nothing does."""
    for key in path:
        try:
            record = record[key]
        except (KeyError, IndexError, TypeError):
            return None
    return record


def need(record: Any, *path: str | int, kind: type, source: str) -> Any:
    """The same, in its type."""
    found = find(record, *path)
    if type(found) is not kind:
        name = ".".join(map(str, path))
        raise InputError(f"{source}: expected {kind.__name__} as {name}, found {shown(record)}")
    return found


def count(record: Any, *path: str, source: str) -> int:
    """The same, a number of things."""
    number: int = need(record, *path, kind=int, source=source)
    if not 0 <= number < 2**31:
        raise InputError(f"{source}: expected a count as {'.'.join(path)}, found {number}")
    return number
