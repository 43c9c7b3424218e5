"""Prompts of a target: a conversation as its chat template renders it, and where an answer follows.

An engine renders the messages with a generation prompt, and the target continues it. Rows, answers
and measurements use the same prompts:

    <|im_start|>user\nWhat is 2 + 2?<|im_end|>\n   messages
    <|im_start|>assistant\n                        generation prompt
    It is 4.<|im_end|>                             answer, and the token that ends it
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, Scalars, require
from domino_jax.base.parse import parse_json
from domino_jax.data.forms import REASONING_KEYS, Conversation, Messages, question
from domino_jax.data.prefix_tokens import shared_length, tokenize
from domino_jax.data.rendering import CostlyTemplate, History, Rendering, render
from domino_jax.data.template import NO_KWARGS, check_kwargs

# A plain exchange, which shows what a template prints around an answer.
QUESTION = {"role": "user", "content": "Hi"}
ANSWER = "Certainly, here it is"
# Tags of reasoning in DeepSeek-R1, Qwen3 and their chat templates.
THINK_BEGIN, THINK_END = "<think>", "</think>"
_READ_KEYS = {"role", "content", "weight", "tool_calls", "function_call", *REASONING_KEYS}


def encode_prompt(
    messages: Messages,
    tokenizer: Any,
    chat_template_kwargs: Scalars = NO_KWARGS,
    *,
    tools: Sequence[Any] | None = None,
) -> np.ndarray:
    """The ids that the target continues with its answer.

    Args:
        messages: a conversation that ends before an answer.
        tokenizer: a transformers fast tokenizer with a chat template.
        chat_template_kwargs: template arguments besides messages and tools.
        tools: JSON schemas of the tools that the template prints.
    Returns:
        int32 [n], generation prompt included.
    Raises:
        InputError: the last message is an answer already, or as `Prompts.before`.
    """
    check_asked(messages)
    prompts = Prompts(messages, tokenizer, chat_template_kwargs, tools=tools)
    return tokenize(prompts.before(len(messages)).text, tokenizer)


def check_asked(messages: Messages) -> None:
    """Raises `InputError` where the last message is an answer already."""
    answered = messages[-1]["role"] == "assistant"
    require(not answered, "the last message is an answer; a prompt ends with a message of the user")


def prompt_of(
    conversation: Conversation, tokenizer: Any, chat_template_kwargs: Scalars = NO_KWARGS
) -> np.ndarray:
    """The prompt of a conversation's last answer, which may be there or not; int32 [n].

    Args:
        conversation: messages, or token ids alone.
        tokenizer, chat_template_kwargs: see `encode_prompt`; the conversation's own override them.
    Raises:
        InputError: as `encode_prompt`.
    """
    if conversation.messages:
        kwargs = kwargs_of(conversation, tokenizer, chat_template_kwargs)
        return encode_prompt(question(conversation), tokenizer, kwargs, tools=conversation.tools)
    assert conversation.input_ids is not None and conversation.loss_mask is not None
    begins = np.flatnonzero(np.diff(conversation.loss_mask.astype(np.int8), prepend=0) == 1)
    prompt = conversation.input_ids[: begins[-1] if len(begins) else None]
    require(len(prompt) > 0, "the answer has no prompt before it")
    return prompt


def kwargs_of(conversation: Conversation, tokenizer: Any, chat_template_kwargs: Scalars) -> Scalars:
    """The template arguments of a conversation: its own over the given ones.

    Raises:
        InputError: its own hold a name that the chat template does not read.
    """
    check_kwargs(tokenizer, conversation.chat_template_kwargs)
    return {**chat_template_kwargs, **conversation.chat_template_kwargs}


class HiddenMessage(InputError):
    """A prompt that does not show a message before it; `prompt` is its text."""

    def __init__(self, message: str, prompt: str) -> None:
        super().__init__(message)
        self.prompt = prompt


@dataclass(frozen=True)
class Prompt:
    """The text of a prompt, and the rendering of the conversation with more messages after it."""

    text: str
    continued: Callable[[Messages], str]


class Prompts:
    """The prompts of a conversation's answers, rendered one after the other.

    Templates differ in the spelling of messages: arguments of tool calls are objects or text, and
    some have no developer role. transformers knows the names of reasoning.
    """

    def __init__(
        self,
        messages: Messages,
        tokenizer: Any,
        chat_template_kwargs: Scalars,
        *,
        tools: Sequence[Any] | None,
    ) -> None:
        """Renders nothing yet; for the arguments see `encode_prompt`."""
        spelled = list(spellings(messages))
        self._messages = messages
        self._history = History(tokenizer, spelled, tools=tools, kwargs=chat_template_kwargs)
        self._shown = [_Shown(each) for each in spelled]

    def before(self, count: int) -> Prompt:
        """The prompt after the first `count` messages, with the generation prompt.

        Raises:
            HiddenMessage: the template does not show a message of the conversation.
            InputError: the template refuses the conversation.
        """
        problems = []
        for number, shown in enumerate(self._shown):
            try:
                text = self._history.render(number, count, generation_prompt=True)
                hidden = shown.first_hidden(count, text)
                if hidden is not None:
                    role = self._messages[hidden]["role"]
                    raise HiddenMessage(
                        f"the chat template does not show message {hidden + 1} ({role})", text
                    )
                continued = partial(self._history.render, number, count, generation_prompt=False)
                return Prompt(text, continued)
            except CostlyTemplate:
                raise
            except InputError as error:
                problems.append(error)
        raise problems[0]


def stop_token_ids(
    tokenizer: Any, chat_template_kwargs: Scalars = NO_KWARGS, *, end_ids: Sequence[int] = ()
) -> tuple[int, ...]:
    """The ids that end an answer.

    Args:
        tokenizer: a transformers fast tokenizer with a chat template.
        chat_template_kwargs: template arguments.
        end_ids: those of the target's directory, see `target.tokens.end_token_ids`.
    Returns:
        The tokenizer's eos, the template's end of turn and the `end_ids`, each once.
    Raises:
        InputError: there is none, or the chat template does not read one of the kwargs or refuses a
            plain exchange.
    """
    check_kwargs(tokenizer, chat_template_kwargs)
    own = turn_end(tokenizer, chat_template_kwargs, end_ids=end_ids)
    stops = dict.fromkeys([tokenizer.eos_token_id, own, *end_ids])
    stops.pop(None, None)
    if not stops:
        raise InputError(
            "the tokenizer has no eos token and its chat template no token that ends a turn"
        )
    return tuple(stops)


def turn_end(
    tokenizer: Any, chat_template_kwargs: Scalars, *, end_ids: Sequence[int]
) -> int | None:
    """The id that a chat template ends an answer with; None where it prints none.

    A tokenizer does not name it: it is the first special token behind an answer, or one directly
    behind that, where the target's files know that one as an end. Templates without it (GLM) show
    the end as the role that follows.

    Args:
        tokenizer, chat_template_kwargs, end_ids: see `stop_token_ids`.
    Raises:
        InputError: the chat template refuses a plain exchange.
    """
    known = {tokenizer.eos_token_id, *end_ids}
    text, _, end = probe(tokenizer, chat_template_kwargs)
    marks: list[int] = []
    for token in map(int, tokenize(text[end:], tokenizer)):
        added = tokenizer.added_tokens_decoder.get(token)
        if added is not None and (added.special or token in known):
            marks.append(token)
        elif marks:
            break
    if marks:
        return next((token for token in marks if token in known), marks[0])
    again = [QUESTION, {"role": "assistant", "content": ANSWER}, QUESTION]
    (text,) = render(tokenizer, [Rendering(again)], chat_template_kwargs)
    ids = tokenize(text[text.rfind(ANSWER) + len(ANSWER) :], tokenizer)
    following = [int(token) for token in ids if int(token) in tokenizer.added_tokens_decoder]
    return following[0] if following and following[0] in known else None


def probe(tokenizer: Any, chat_template_kwargs: Scalars) -> tuple[str, int, int]:
    """The rendered text of a plain exchange, and where its answer begins and ends."""
    exchange = [QUESTION, {"role": "assistant", "content": ANSWER}]
    (text,) = render(tokenizer, [Rendering(exchange)], chat_template_kwargs)
    begin = text.rfind(ANSWER)
    require(begin >= 0, "the chat template does not show the text of an answer")
    return text, begin, begin + len(ANSWER)


def mentions(template: str, name: str) -> bool:
    """Whether the text of a template holds a name."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def spellings(messages: Messages) -> Iterator[Messages]:
    """Messages as templates may read them: arguments as objects or text, developer or system."""
    parsed = [_with_objects(message) for message in messages]
    spelled = [parsed, messages] if parsed != messages else [messages]
    if any(message["role"] == "developer" for message in messages):
        as_system = {"developer": "system"}
        spelled += [
            [{**m, "role": as_system.get(m["role"], m["role"])} for m in each] for each in spelled
        ]
    yield from spelled


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have objects as arguments where they were JSON text."""
    calls = []
    for call in message.get("tool_calls", []):
        function = call.get("function", call)
        arguments = function.get("arguments")
        try:
            text = isinstance(arguments, str)
            found = parse_json(arguments, source=None, nonfinite=True) if text else None
        except InputError:
            found = None
        if isinstance(found, dict):
            function = {**function, "arguments": found}
            call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of a message under any of its names; empty where it has none."""
    return next((message[name] for name in REASONING_KEYS if name in message), "")


def unused_keys(conversation: Conversation, template: str) -> Iterator[str]:
    """The keys of a line and of its messages that neither a reader nor the template reads."""
    yield from conversation.unused
    if conversation.input_ids is not None:
        return
    keys = {key for message in conversation.messages for key in message}
    for key in sorted(keys - _READ_KEYS):
        if not mentions(template, key):
            yield f"message key {key!r}"
    if conversation.tools and not mentions(template, "tools"):
        yield "key 'tools'"


class _Shown:
    """Which messages are in the text of a conversation; templates may shorten answers.

    Messages have parts of the text in their order, those of a system anywhere else. What was found
    in the beginning that a text shares with the one before is not searched for again.
    """

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._text = ""
        self._parts: list[tuple[int, int]] = []  # of the first messages; empty ones of a system

    def first_hidden(self, count: int, text: str) -> int | None:
        """The first of `count` messages that is not in rendered text; None where all are."""
        shared = shared_length(text, self._text)
        while self._parts and self._parts[-1][1] > shared:
            self._parts.pop()
        del self._parts[count:]
        self._text = text
        while len(self._parts) < count:
            message = self._messages[len(self._parts)]
            at = self._parts[-1][1] if self._parts else 0
            part = (at, at) if message["role"] == "system" else _part(message, text, at)
            if part is None:
                if message["role"] != "assistant" and not _is_in(message["content"], text):
                    return len(self._parts)
                return _first_hidden(self._messages[:count], text)
            self._parts.append(part)
        systems = [m for m in self._messages[:count] if m["role"] == "system"]
        if systems:
            bounds = [0, *(bound for part in self._parts for bound in part), len(text)]
            gaps = [text[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
            if _first_hidden(systems, "\0".join(gaps)) is not None:
                return _first_hidden(self._messages[:count], text)
        return None


def _part(message: Mapping[str, Any], text: str, at: int) -> tuple[int, int] | None:
    """The first part of rendered text behind a character that shows a message."""
    content, role = message["content"], message["role"]
    # Of an answer in an earlier turn a template may show what follows its reasoning.
    if role == "assistant" and THINK_END in content and not _is_in(content, text):
        content = content.rpartition(THINK_END)[2]
        if not content.strip():
            return None
    for spelled in _spelled(content):
        begin = text.find(spelled, at)
        if begin >= 0:
            return begin, begin + len(spelled)
    return None


def _is_in(content: str, text: str) -> bool:
    return any(spelled in text for spelled in _spelled(content))


def _spelled(content: str) -> tuple[str, str]:
    """A content as a template shows it: as it is, or escaped as JSON."""
    words = content.strip()
    return words, json.dumps(words, ensure_ascii=False)[1:-1]


def _first_hidden(messages: Messages, text: str) -> int | None:
    """The first message that is not in rendered text; templates may shorten answers.

    Each message takes its own part of the text, the longest first: the words of one may occur in
    another.
    """
    hidden = []
    order = sorted(range(len(messages)), key=lambda at: -len(messages[at]["content"]))
    for at in order:
        for spelled in _spelled(messages[at]["content"]):
            if spelled in text:
                text = text.replace(spelled, "\0", 1) if spelled else text
                break
        else:
            if messages[at]["role"] != "assistant":
                hidden.append(at)
    return min(hidden, default=None)
