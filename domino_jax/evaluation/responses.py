"""JSON responses of servers, bounded in time and size; a fault is one line with the address."""

import http.client
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from domino_jax.base.errors import InputError, shown
from domino_jax.base.parse import parse_json

TIMEOUT_SECONDS = 600.0  # for a response: a long answer takes minutes on a slow machine
RESPONSE_BYTES = 2**24  # more than any answer in JSON


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
        timeout: seconds for all of it.
        question: is posted as JSON; None gets what is there.
    Raises:
        InputError: there is none, or not in time, or one that has no end.
    """
    data = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    ends = time.monotonic() + timeout
    said = bytearray()
    try:
        with urllib.request.build_opener(_AsAnswered).open(request, timeout=timeout) as response:
            # In pieces: who sends a byte now and then is always within the time of a piece.
            while piece := response.read1(2**16):
                said += piece
                if time.monotonic() > ends:
                    raise TimeoutError
                if len(said) > RESPONSE_BYTES:
                    raise InputError(f"{address}: more than {RESPONSE_BYTES} bytes")
            return response.status, bytes(said)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        # urllib wraps what goes wrong before there is a response.
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            reason = f"no response within {timeout:g} seconds"
        raise InputError(f"{address}: {str(reason) or type(reason).__name__}") from error


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
