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
from dataclasses import dataclass, field
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Namespace
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

TEXT_CHARACTERS = 2**26  # of a rendered conversation
BLOCK = 1024  # characters that two texts are compared by
DATE = "strftime_now"  # in kwargs an ISO date, in a template the function that formats it


@dataclass(frozen=True)
class Template:
    """As much of a tokenizer as transformers' rendering asks for."""

    text: str
    special_tokens_map: dict[str, str]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The text of the template."""
        return self.text

    def prepared(self, messages: Any, tools: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The variables of the template for a conversation, as transformers prepares them.

        transformers treats each message by itself, so the messages of a shorter conversation are
        the first ones of a longer one.
        """
        arguments: dict[str, Any] = {}

        def keep(**given: Any) -> str:
            arguments.update(given)
            return ""

        # transformers caches the compiled template, and calls its `render` at the end.
        compiled: Any = _compile_jinja_template(self.text)
        compiled.render = keep
        apply: Any = PreTrainedTokenizerBase.apply_chat_template
        # The date is left out: transformers turns a function among the kwargs into text.
        kwargs = {key: value for key, value in kwargs.items() if key != DATE}
        apply(self, messages, tools=tools, tokenize=False, **kwargs)
        return arguments

    def rendered(self, arguments: dict[str, Any], date: str | None) -> str:
        """The text of a conversation with `prepared` variables on a date, an ISO date."""
        compiled: Any = _compile_jinja_template(self.text)
        compiled.globals[DATE] = _formatted(date)
        _quicken(compiled.environment)
        random.seed(0)  # Jinja's `random` and `lipsum`
        text = jinja2.Template.render(compiled, **arguments)
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


@dataclass
class Conversation:
    """A conversation of which several beginnings are rendered.

    Attributes:
        spellings: its messages, as templates may read them.
        tools: JSON schemas.
        kwargs: template arguments.
        prepared: variables of the template for each spelling that was rendered.
        text: the latest rendering.
    """

    spellings: list[Any]
    tools: Any
    kwargs: dict[str, Any]
    prepared: dict[int, dict[str, Any]] = field(default_factory=dict)
    text: str = ""

    def rendered(
        self, template: Template, spelling: int, count: int, more: Any, generation_prompt: bool
    ) -> tuple[int, str]:
        """The text of the first `count` messages of a spelling, and of `more` after them.

        Returns:
            How many characters the text shares with the text before, and the rest of it.
        """
        if spelling not in self.prepared:
            messages = self.spellings[spelling]
            self.prepared[spelling] = template.prepared(messages, self.tools, self.kwargs)
        arguments = self.prepared[spelling]
        messages = arguments["messages"][:count]
        if more:
            messages += template.prepared(more, None, self.kwargs)["messages"]
        arguments = arguments | {"messages": messages, "add_generation_prompt": generation_prompt}
        text = template.rendered(arguments, self.kwargs.get(DATE))
        shared = 0
        while self.text.startswith(text[shared : shared + BLOCK], shared) and shared < len(text):
            shared += BLOCK
        shared = min(shared, len(text))  # the last block may be shorter
        self.text = text
        return shared, text[shared:]


_DICT_METHODS = frozenset(dir(dict))
# The sandbox replaces the two others, which read attributes.
_TEXT_METHODS = {name for name in dir(str) if name[0] != "_"} - {"format", "format_map"}
_HOLDERS = (LoopContext, Namespace)
_PLAIN = (str, int, float, bool, dict, list, type(None))


def _quicken(environment: Any) -> None:
    """Lets plain reads and calls of a template pass the sandbox without its checks.

    The checks take most of the time of a conversation of a thousand turns. These pass all of them:
    a key of a message that is not the name of a method, plain data of a loop or a namespace, a
    method of text, and a call of such a method or of a macro.
    """
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment
    undefined = environment.undefined

    def quick_getattr(owner: Any, name: str) -> Any:
        kind = type(owner)
        if kind is dict and name not in _DICT_METHODS:
            return owner[name] if name in owner else undefined(obj=owner, name=name)
        if kind is str and name in _TEXT_METHODS:
            return getattr(owner, name)
        if issubclass(kind, _HOLDERS) and not name.startswith("_"):
            value = getattr(owner, name, owner)
            if type(value) in _PLAIN:
                return value
        return sandbox.getattr(environment, owner, name)

    def quick_call(context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        kind = type(called)
        if kind is Macro:
            args = (context.eval_ctx, *args)
        elif kind is not BuiltinMethodType or type(called.__self__) is not str:
            return sandbox.call(environment, context, called, *args, **kwargs)
        kwargs.pop("_loop_vars", None)
        kwargs.pop("_block_vars", None)
        return called(*args, **kwargs)

    environment.getattr, environment.call = quick_getattr, quick_call


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
    conversation = Conversation([], None, {})
    # What the process takes already and a little more. Systems without /proc know no such bound.
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin.buffer:
        costly = False
        try:
            request = json.loads(line)
            # Only with its first request: it may be long, and is the same for all that follow.
            if "template" in request:
                template = Template(**request["template"])
            # It is sent once as well, and then rendered up to each of its answers.
            if "conversation" in request:
                conversation = Conversation(**request["conversation"])
            signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process
            job = request["job"]
            answer = template.names() if job is None else conversation.rendered(template, **job)
            reply = json.dumps({"answer": answer}).encode()
        except MemoryError:
            costly, reply = True, b'{"costly": true}'
        except Exception as error:  # a template is a program of its own: it may raise anything
            reply = json.dumps({"error": " ".join(str(error).split())[:200]}).encode()
        # Between two requests nobody renders, and the wait for the next may be long.
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
        if costly:
            return  # and gives the memory back


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
