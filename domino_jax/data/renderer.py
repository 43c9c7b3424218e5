"""The process that runs chat templates for `rendering.py`, and that may be ended for what they do.

Run by its path, it imports nothing of this package: a line of JSON comes in, a line of JSON goes
out. The kernel ends it by itself where one rendering takes too long, even inside one operation.

A rendering depends on its request alone. A template gets the date of the request instead of the
clock, and the same random numbers each time.
"""

import contextlib
import datetime
import json
import random
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

TEXT_CHARACTERS = 2**26  # of a rendered conversation
DATE = "strftime_now"  # in kwargs an ISO date, in a template the function that formats it


@dataclass(frozen=True)
class Template:
    """As much of a tokenizer as transformers' rendering asks for."""

    text: str
    special_tokens_map: dict[str, str]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The text of the template."""
        return self.text

    def rendered(
        self, messages: Any, generation_prompt: bool, tools: Any, kwargs: dict[str, Any]
    ) -> str:
        """The text of a conversation, as transformers renders it on the date in `kwargs`."""
        # transformers turns a function among the kwargs into text. It caches the compiled template.
        compiled: Any = _compile_jinja_template(self.text)
        compiled.globals[DATE] = _formatted(kwargs.pop(DATE, None))
        random.seed(0)  # Jinja's `random` and `lipsum`
        apply: Any = PreTrainedTokenizerBase.apply_chat_template
        text = apply(
            self,
            messages,
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **kwargs,
        )
        if len(text) > TEXT_CHARACTERS:
            raise MemoryError
        text.encode("utf-8")  # a template can spell half a surrogate pair
        return text

    def names(self) -> list[str]:
        """The names that the template looks up and does not set."""
        environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])
        # Two tags of transformers' own, which mark answers and read nothing.
        source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.text)
        return sorted(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def _formatted(date: str | None) -> Callable[[str], str]:
    """The function that formats a date, an ISO date, for a template."""

    def strftime_now(format: str) -> str:
        if date is None:
            raise ValueError(
                f"it prints the date; give chat_template_kwargs.{DATE}, for example 2026-12-01"
            )
        return datetime.datetime.fromisoformat(date).strftime(format)

    return strftime_now


def main(seconds: float, memory_bytes: int) -> None:
    """Answers requests until the other end closes the pipe."""
    template = Template("", {})
    # What the process takes already and a little more. Systems without /proc know no such bound.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Only with its first request: it may be long, and is the same for all that follow.
        if "template" in request:
            template = Template(**request["template"])
        answers: list[Any] = []
        try:
            for job in request["jobs"]:
                signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process
                answers.append(template.names() if job is None else template.rendered(*job))
            reply: dict[str, Any] = {"answers": answers}
        except MemoryError:
            reply = {"costly": True}
        except Exception as error:  # a template is a program of its own: it may raise anything
            reply = {"error": " ".join(str(error).split())[:200]}
        # Between two requests nobody renders, and the wait for the next may be long.
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()
        if "costly" in reply:
            return  # and gives the memory back


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
