"""Answers made up, and serving engines played on the loopback by what a test gives them."""

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from unittest.mock import patch

import numpy as np

from domino_jax.decoding.generate import Answer

# Path and question -> status and body, as bytes or what is to be JSON; a location to go to behind.
Respond = Callable[[str, Any], tuple[Any, ...]]
# Prompt, new tokens at most and stop ids -> the answer.
Decode = Callable[[np.ndarray, int, Sequence[int]], Answer]
COUNTED = (
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "generation_tokens",
)
NOT_FOUND = (404, {"detail": "Not Found"})


def own_answer(*tokens: int, stopped: bool = False) -> Answer:
    """An answer of the target alone, which verifies nothing."""
    ids, count = np.array(tokens, np.int32), len(tokens) - 1
    return Answer(ids, np.zeros(len(ids), bool), stopped, count, count, seconds=1.0)


@contextmanager
def serving(respond: Respond) -> Iterator[str]:
    """The address of a server that responds so, for the time of the body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, question: Any) -> None:
            status, said, *location = respond(self.path, question)
            body = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if location:
                self.send_header("Location", location[0])
            with suppress(OSError):  # a client that left; http.server would print a traceback
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)  # quick to end
    thread.start()
    try:
        # A proxy of whoever runs the tests is not asked.
        with patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
            yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def speaking(words: Iterable[bytes], *, pause: float) -> Iterator[str]:
    """The host and port of a server that reads a request, sends these bytes and closes.

    Args:
        words: sent one after the other.
        pause: seconds between them.
    """

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the other side has left
            connection.recv(2**16)
            for word in words:
                connection.sendall(word)
                if ended.wait(pause):
                    return

    ended = Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        with patch.dict(os.environ, {"no_proxy": "127.0.0.1"}):
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        ended.set()
        thread.join()


@dataclass
class SGLang:
    """SGLang as far as it is asked; `asked` holds the questions."""

    decode: Decode
    block: int = 4
    asked: list[Any] = field(default_factory=list)

    def __call__(self, path: str, question: Any) -> tuple[Any, ...]:
        if path == "/server_info":
            draft = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": self.block}
            return 200, {"version": "0.5.19", "port": 30000, **draft}
        if path != "/generate":
            return NOT_FOUND
        self.asked.append(question)
        sampling = question["sampling_params"]
        ids, limit = question["input_ids"], sampling["max_new_tokens"]
        answer = self.decode(np.array(ids, np.int32), limit, sampling["stop_token_ids"])
        length, verifications = len(answer.tokens), answer.verifications
        meta = {
            "completion_tokens": length,
            "spec_verify_ct": verifications,
            # Not tau: with the first token.
            "spec_accept_length": length / max(verifications, 1),
            "finish_reason": {"type": "stop" if answer.stopped else "length"},
        }
        # As some versions: behind the end of the prompt.
        tokens = [*ids[-2:], *answer.tokens.tolist()]
        return 200, {"text": "", "output_ids": tokens, "meta_info": meta}


@dataclass
class VLLM:
    """vLLM as far as it is asked, with figures of each request or counters of all.

    `kept_beyond` counts drafts that were kept beyond the end of an answer, as its scheduler does.
    """

    decode: Decode
    proposals: int = 3
    per_request: bool = False
    kept_beyond: int = 0
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTED, 0))

    def __call__(self, path: str, question: Any) -> tuple[Any, ...]:
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "tiny", "owned_by": "vllm"}]}
        if path == "/version":
            return 200, {"version": "0.30.0"}
        if path == "/metrics":
            lines = [
                f'vllm:{name}_total{{engine="{engine}",model_name="tiny"}} {float(value)}'
                for name, value in self.counted.items()
                for engine, value in ((0, value), (1, 0))
            ]
            return 200, "\n".join(["# HELP vllm:x", *lines, "python_gc 1e3", ""]).encode()
        if path != "/v1/completions" or question["model"] != "tiny":
            return NOT_FOUND
        ids, limit = question["prompt"], question["max_tokens"]
        answer = self.decode(np.array(ids, np.int32), limit, question["stop_token_ids"])
        length, drafts = len(answer.tokens), answer.verifications
        kept = int(answer.drafted.sum()) + self.kept_beyond
        added = (drafts, drafts * self.proposals, kept, length)
        for name, value in zip(COUNTED, added, strict=True):
            self.counted[name] += value
        told = answer.tokens.tolist() if question["return_token_ids"] else None
        choice = {"index": 0, "text": "", "token_ids": told}
        response = {"choices": [choice], "usage": {"completion_tokens": length}, "metrics": None}
        if self.per_request:
            names = ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
            figures = dict(zip(names, added, strict=False))
            response["metrics"] = {"speculative_decoding": figures}
        return 200, response
