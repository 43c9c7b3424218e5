"""Chat templates run in a process of their own, under limits of time and memory.

A template comes with a target from somewhere and is a program: its loops may never end, one
multiplication of text may ask for all memory. Neither can be stopped from inside the process that
trains, so another one renders; where it breaks a limit the kernel ends it and its memory is gone:

    render  -- a line of JSON: a conversation -->  renderer.py, started once, at the first rendering
            <-- its text, or what was wrong --         setitimer(SECONDS), RLIMIT_AS

transformers renders there as it does anywhere, but for the date, which is one of the kwargs
(`template.DATE`) and never read from the clock. A question costs about 0.1 ms. A conversation is
sent once, and of a text that begins like the one before only the rest comes back: so a thousand
turns, each rendered with all before it, take seconds.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.parse import parse_json

SECONDS = 5.0  # for one conversation; a good template takes milliseconds
MEMORY_BYTES = 2**29  # beyond what the process takes when it starts


class CostlyTemplate(InputError):
    """A chat template took more time or memory than any good one; it would each time."""


class Rendering(NamedTuple):
    """A conversation to render, its tools, and `generation_prompt` (add_generation_prompt)."""

    messages: list[dict[str, Any]]
    generation_prompt: bool = False
    tools: Sequence[Any] | None = None


def render(tokenizer: Any, conversations: Iterable[Rendering], kwargs: Scalars) -> list[str]:
    """The text of each conversation, as the tokenizer's `apply_chat_template` renders it.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        conversations: what to render.
        kwargs: what the template is told besides the messages.
    Raises:
        CostlyTemplate: one took more than `SECONDS` or `MEMORY_BYTES`.
        InputError: the template refuses one of them.
    """
    texts = []
    for messages, generation_prompt, tools in conversations:
        history = History(tokenizer, [messages], tools=tools, kwargs=kwargs)
        texts.append(history.render(0, len(messages), generation_prompt=generation_prompt))
    return texts


class History:
    """A conversation of which the messages up to any of them are rendered."""

    def __init__(
        self, tokenizer: Any, spellings: Sequence[Any], *, tools: Sequence[Any] | None, kwargs: Any
    ) -> None:
        """Keeps the conversation until it is rendered.

        Args:
            tokenizer: a transformers tokenizer with a chat template.
            spellings: the messages, as templates may read them.
            tools, kwargs: see `render`.
        """
        self._tokenizer = tokenizer
        self._request = {"spellings": spellings, "tools": tools, "kwargs": dict(kwargs)}

    def render(
        self, spelling: int, count: int, more: Sequence[Any] = (), *, generation_prompt: bool
    ) -> str:
        """The text of the first `count` messages of a spelling, and of `more` after them.

        Raises:
            CostlyTemplate, InputError: see `render`.
        """
        job = {"spelling": spelling, "count": count, "more": list(more)}
        job["generation_prompt"] = generation_prompt
        problem = "the chat template refuses it"
        text: str = _process.ask(self._tokenizer, job, conversation=self._request, problem=problem)
        return text


def names_read(tokenizer: Any) -> set[str]:
    """The names that a tokenizer's chat template looks up and does not set.

    Raises:
        CostlyTemplate: to find out took more than `SECONDS` or `MEMORY_BYTES`.
        InputError: it is not a template.
    """
    text = tokenizer.get_chat_template()
    if text not in _names:  # asked for each line with arguments of its own
        problem = "the chat template cannot be read"
        _names[text] = _process.ask(tokenizer, None, problem=problem)
    return set(_names[text])


class _Process:
    """`renderer.py`, started when it is first asked and again after it was ended.

    `seconds` and `memory_bytes` bound each rendering.
    """

    def __init__(self, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> None:
        self._seconds, self._memory_bytes = seconds, memory_bytes
        self._lock = threading.Lock()
        self._running: Any = None  # the process, with pipes as its input and output
        self._template: dict[str, Any] = {}
        self._conversation: dict[str, Any] | None = None  # that the process has
        self._text = ""  # its latest rendering
        atexit.register(self.end)

    def ask(
        self,
        tokenizer: Any,
        job: dict[str, Any] | None,
        *,
        problem: str,
        conversation: dict[str, Any] | None = None,
    ) -> Any:
        """The answer to one request, see `renderer.main`.

        Args:
            tokenizer: a transformers tokenizer with a chat template.
            job: arguments of `renderer.Conversation.rendered`; None for the names of the template.
            problem: begins the message of an `InputError`.
            conversation: the `renderer.Conversation`; the same object is sent once.
        Raises:
            CostlyTemplate: the job broke a limit.
            InputError: the template failed: the `problem`, and its error.
        """
        template = {
            "text": tokenizer.get_chat_template(),
            "special_tokens_map": tokenizer.special_tokens_map,
        }
        request: dict[str, Any] = {"job": job}
        # One exchange at a time: a reply does not say which request it answers.
        with self._lock:
            if self._running is None:
                self._start()
            if template != self._template:
                request["template"] = self._template = template
                self._conversation = None  # its variables are those of a template
            if conversation is not None and conversation is not self._conversation:
                request["conversation"] = self._conversation = conversation
                self._text = ""
            try:
                self._running.stdin.write(json.dumps(request).encode() + b"\n")
                self._running.stdin.flush()
                line = self._running.stdout.readline()
            except BrokenPipeError:  # the process ended instead
                line = b""
            except BaseException:  # half an exchange: the next one would read its rest
                self.end()
                raise
            if line.endswith(b"\n"):
                reply = parse_json(line, source="the process that renders chat templates")
                if "error" in reply:
                    raise InputError(f"{problem}: {reply['error']}")
                if "costly" not in reply:
                    if job is None:
                        return reply["answer"]
                    shared, rest = reply["answer"]
                    self._text = self._text[:shared] + rest
                    return self._text
            code = self.end()
        # What is left of a line says that it was costly; below 0 is the signal that ended it.
        if line or code < 0:
            late = code == -signal.SIGALRM
            limit = f"{self._seconds:g} s" if late else f"{self._memory_bytes // 2**20} MiB"
            raise CostlyTemplate(
                f"the chat template took more than {limit} for one conversation; "
                "use another template"
            )
        raise RuntimeError(f"the process that renders chat templates ended with code {code}")

    def end(self) -> int:
        """Ends the process; its exit code, or 0 where there was none."""
        running, self._running, self._template = self._running, None, {}
        self._conversation = None
        if running is None:
            return 0
        with contextlib.suppress(BrokenPipeError):
            running.stdin.close()  # which ends it, unless it is rendering
        try:
            code = running.wait(timeout=1)
        except subprocess.TimeoutExpired:
            running.kill()
            code = running.wait()
        running.stdout.close()
        return code

    def _start(self) -> None:
        script = Path(__file__).with_name("renderer.py")
        # A session of its own: Ctrl-C is for the process that asks. It ends when the pipe does. -P:
        # the modules beside the script must not be found by their bare names, such as `template`.
        self._running = subprocess.Popen(
            [sys.executable, "-P", str(script), str(self._seconds), str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # `strftime_now("%s")` depends on the time zone.
            env={**os.environ, "TZ": "UTC"},
            start_new_session=True,
        )


_process = _Process()
_names: dict[str, list[str]] = {}  # of each template's text
