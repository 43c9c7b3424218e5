"""Prompts of a target: a conversation as its chat template renders it, and where an answer follows.

An engine renders the messages with a generation prompt, and the target continues it. Rows, answers
and measurements use the same prompts:

    <|im_start|>user\nWhat is 2 + 2?<|im_end|>\n   messages
    <|im_start|>assistant\n                        generation prompt
    It is 4.<|im_end|>                             answer, and the token that ends it
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, Scalars, require
from domino_jax.base.parse import parse_json
from domino_jax.data.forms import REASONING_KEYS, Conversation, Messages, question
from domino_jax.data.rendering import CostlyTemplate, Rendering, render
from domino_jax.data.template import NO_KWARGS, check_kwargs

# Tags of reasoning in DeepSeek-R1, Qwen3 and their chat templates.
THINK_BEGIN, THINK_END = "<think>", "</think>"
EMPTY_REASONING = re.compile(rf"\A\s*{THINK_BEGIN}\s*{THINK_END}\s*")
# A generation prompt that opens reasoning, or closes it at once (Qwen3 without thinking).
OPENED = re.compile(rf"{THINK_BEGIN}\s*({THINK_END}\s*)?\Z")


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
        InputError: the last message is an answer already, or as `render_prompt`.
    """
    if messages[-1]["role"] == "assistant":
        raise InputError("the last message is an answer; a prompt ends with a message of the user")
    _, text = render_prompt(messages, tokenizer, chat_template_kwargs, tools=tools)
    return tokenize(text, tokenizer)


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
        kwargs = {**chat_template_kwargs, **conversation.chat_template_kwargs}
        return encode_prompt(question(conversation), tokenizer, kwargs, tools=conversation.tools)
    assert conversation.input_ids is not None and conversation.loss_mask is not None
    begins = np.flatnonzero(np.diff(conversation.loss_mask.astype(np.int8), prepend=0) == 1)
    return conversation.input_ids[: begins[-1] if len(begins) else None]


def render_prompt(
    messages: Messages,
    tokenizer: Any,
    chat_template_kwargs: Scalars,
    *,
    tools: Sequence[Any] | None = None,
) -> tuple[Messages, str]:
    """The messages as the chat template reads them, and their text with the generation prompt.

    Templates differ in the spelling of messages: arguments of tool calls are objects or text, and
    some have no developer role. transformers knows the names of reasoning.

    Args:
        messages: a conversation that ends before an answer.
        tokenizer, chat_template_kwargs, tools: see `encode_prompt`.
    Raises:
        InputError: the template refuses the conversation, or does not show a message of it.
    """
    problems = []
    for spelled in spellings(messages):
        rendering = Rendering(spelled, generation_prompt=True, tools=tools)
        try:
            (text,) = render(tokenizer, [rendering], chat_template_kwargs)
            for number, message in enumerate(spelled, start=1):
                # Templates strip earlier answers of their reasoning.
                shown_here = message["role"] == "assistant" or shows(text, message["content"])
                role = messages[number - 1]["role"]
                require(shown_here, f"the chat template does not show message {number} ({role})")
            return spelled, text
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
    turn_ends = _turn_ends(*_probe(tokenizer, chat_template_kwargs), tokenizer)
    stops = dict.fromkeys([tokenizer.eos_token_id, *turn_ends, *end_ids])
    stops.pop(None, None)
    if not stops:
        raise InputError(
            "the tokenizer has no eos token and its chat template no token that ends a turn"
        )
    return tuple(stops)


@dataclass(frozen=True)
class Frame:
    """The surroundings of an answer: white space and other text before it, the id that ends it."""

    space: str
    inserted: str
    end: int


def frame_of(tokenizer: Any, kwargs: Scalars) -> Frame:
    """The surroundings of a plain answer in the chat template's rendering.

    Raises:
        InputError: the template has no generation prompt where it needs one, or shows no answer.
    """
    text, begin, end = _probe(tokenizer, kwargs)
    prompt, without = render(
        tokenizer, [Rendering([_QUESTION], generation_prompt=True), Rendering([_QUESTION])], kwargs
    )
    known = prompt if text.startswith(prompt) else OPENED.sub("", prompt)
    before = text[len(known) : begin] if text.startswith(known) else ""
    # Empty reasoning, which Qwen3's templates insert, is no part of the answer; the prompt may open
    # it already.
    opening = OPENED.search(prompt) if known == prompt else None
    if opening is not None and EMPTY_REASONING.fullmatch(opening[0] + before):
        before = ""
    inserted = EMPTY_REASONING.sub("", before)
    if prompt == without and inserted.strip():
        raise InputError(
            "the chat template ignores add_generation_prompt, which marks where an answer begins"
        )
    turn_ends = _turn_ends(text, begin, end, tokenizer)
    return Frame(
        space="" if before.strip() else before,
        inserted=before if inserted.strip() else "",
        end=(turn_ends or [tokenizer.eos_token_id])[0],
    )


_QUESTION = {"role": "user", "content": "Hi"}
_ANSWER = "Certainly, here it is"


def _probe(tokenizer: Any, kwargs: Scalars) -> tuple[str, int, int]:
    """The text of a plain exchange, and where the answer begins and ends in it."""
    exchange = [_QUESTION, {"role": "assistant", "content": _ANSWER}]
    (text,) = render(tokenizer, [Rendering(exchange)], kwargs)
    begin = text.rfind(_ANSWER)
    require(begin >= 0, "the chat template does not show the text of an answer")
    return text, begin, begin + len(_ANSWER)


def _turn_ends(text: str, begin: int, end: int, tokenizer: Any) -> list[int]:
    """The id that the template ends a turn with: the first added token after an answer."""
    # A tokenizer does not name the end of a turn.
    after = tokenize(text[end:], tokenizer)
    return [int(token) for token in after if int(token) in tokenizer.added_tokens_decoder][:1]


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
            found = parse_json(arguments, source=None) if isinstance(arguments, str) else None
        except InputError:  # text that is no JSON stays as it is
            found = None
        if isinstance(found, dict):
            function = {**function, "arguments": found}
            call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else message


def reasoning_of(message: Mapping[str, Any]) -> str:
    """The reasoning of a message under any of its names; empty where it has none."""
    return next((message[name] for name in REASONING_KEYS if name in message), "")


def shows(text: str, *parts: str) -> bool:
    """Whether text holds the parts in their order, as they are or escaped as JSON."""
    at = 0
    for part in parts:
        words = part.strip()
        spellings = (words, json.dumps(words, ensure_ascii=False)[1:-1])
        found = [text.find(words, at) for words in spellings if text.find(words, at) >= 0]
        if not found:
            return False
        at = min(found) + len(words)
    return True


def shows_calls(written: str, calls: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a rendered answer holds the names and the arguments of its tool calls."""
    for call in calls:
        function = call.get("function", call)
        if not shows(written, function["name"]):
            return False
        if not all(shows(written, words) for words in _leaves(function.get("arguments"))):
            return False
    return True


def _leaves(value: Any) -> Iterator[str]:
    """The text and the numbers inside the arguments of a tool call."""
    if isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_leaves, value.values()))
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(map(_leaves, value))
    elif value is not None:
        yield value if isinstance(value, str) else json.dumps(value)


def tokenize(text: str, tokenizer: Any) -> np.ndarray:
    """The ids of rendered text, int32 [n]."""
    # The template wrote the special tokens; verbose would warn of long rows, which are cut later.
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def tokenize_with_ends(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids of rendered text, int32 [n], and the character that each token ends at, int64 [n]."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int32), spans[:, 1]
