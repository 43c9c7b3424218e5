"""Lines of conversation files: JSONL of messages, of token ids, or of both.

Each line is checked by itself and becomes a `Conversation`, or a `BadLine` with its number:

    {"messages": [{"role": "user", "content": ...}, ...], "tools": [...]}             text
    {"input_ids": [...], "loss_mask": [0, ..., 1]}                                    token ids
    {"messages": ..., "prompt_ids": [...], "output_ids": [...], "finish_reason": "stop"}
    {"generator": {...}}      header of the lines after it: the settings that generated them
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domino_jax.base.errors import InputError, Scalars, require, scalars, shown
from domino_jax.base.files import LINE_BYTES, read_lines
from domino_jax.base.parse import parse_json
from domino_jax.data.template import GENERATOR, KWARGS

ROLES = ("system", "developer", "user", "assistant", "tool")
# Names of a message's reasoning: vLLM and SGLang, OpenRouter, gpt-oss.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
PROMPT_LINE = "prompt_line"
PROMPT_IDS, OUTPUT_IDS, FINISH_REASON = "prompt_ids", "output_ids", "finish_reason"
INPUT_IDS, LOSS_MASK = "input_ids", "loss_mask"
_LINE_KEYS = {"messages", "tools", "finished", KWARGS, GENERATOR, PROMPT_LINE}
_LINE_KEYS |= {PROMPT_IDS, OUTPUT_IDS, FINISH_REASON, INPUT_IDS, LOSS_MASK}

KEPT_LINES, KEPT_KINDS = 1000, 100  # of bad lines

# {"role": ..., "content": ...}; further keys, as `tool_calls`, reach the template unchanged
Messages = list[dict[str, Any]]


@dataclass(frozen=True, order=True)
class BadLine:
    """A line of a file that cannot be used; `line` counts from 1."""

    line: int
    reason: str


@dataclass
class BadLines:
    """Lines that cannot be used: their number, and the first ones.

    Attributes:
        total: how many there are.
        first: the first `KEPT_LINES`.
        kinds: reason without its numbers and quotes -> the first line, and how many there are.
    """

    total: int = 0
    first: list[BadLine] = field(default_factory=list)
    kinds: dict[str, tuple[BadLine, int]] = field(default_factory=dict)

    def add(self, bad: BadLine) -> None:
        """Counts a line."""
        self.total += 1
        if len(self.first) < KEPT_LINES:
            self.first.append(bad)
        kind = re.sub(r"\d+|'[^']*'", "", bad.reason)
        if kind not in self.kinds and len(self.kinds) >= KEPT_KINDS:
            kind = ""
        first, count = self.kinds.get(kind, (bad, 0))
        self.kinds[kind] = first, count + 1

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[BadLine]:
        """The first lines."""
        return iter(self.first)

    def by_reason(self) -> list[tuple[BadLine, int]]:
        """The first line of each kind of reason and their number; most lines first."""
        return sorted(self.kinds.values(), key=lambda kind: -kind[1])

    def report(self, path: str | Path) -> Iterator[str]:
        """A line of text on each kind of reason."""
        for bad, count in self.by_reason():
            more = f" and {count - 1} more lines" if count > 1 else ""
            yield f"{path}:{bad.line}{more}: {bad.reason}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversation:
    """A usable line of a file.

    Attributes:
        line: its number, counted from 1.
        messages: contents are text, possibly empty; no key is null. Empty for ids alone.
        tools: JSON schemas of the tools that the template prints.
        chat_template_kwargs: template arguments of this line, which override the run's.
        finished: False where the last answer was cut at a token limit.
        input_ids: int32 [n], the tokens as they were generated; None for text.
        loss_mask: bool [n], True where the target generated the token; None for text.
        prompt_line: line of the prompt that `regenerate` answered.
        generator: settings that generated the answers; None where the file does not record them.
        unused: keys of the line that nothing reads.
    """

    line: int
    messages: Messages = field(default_factory=list)
    tools: Sequence[Any] | None = None
    chat_template_kwargs: Scalars = field(default_factory=dict)
    finished: bool = True
    input_ids: np.ndarray | None = None
    loss_mask: np.ndarray | None = None
    prompt_line: int | None = None
    generator: Mapping[str, Any] | None = None
    unused: Sequence[str] = ()


class ConversationSet(NamedTuple):
    """The usable conversations of a file, and the lines left out."""

    conversations: list[Conversation]
    bad_lines: BadLines


def read_conversations(path: str | Path) -> ConversationSet:
    """Reads conversations or prompts, packed (`.gz`) or not.

    Args:
        path: JSONL, see the module; empty lines are skipped.
    Returns:
        The usable lines, and per other line its number and the reason.
    Raises:
        InputError: the file cannot be read or has no usable line.
    """
    conversations, bad_lines = [], BadLines()
    for found in iterate_conversations(path):
        if isinstance(found, BadLine):
            bad_lines.add(found)
        else:
            conversations.append(found)
    if not conversations:
        raise nothing_usable(path, bad_lines)
    return ConversationSet(conversations, bad_lines)


def iterate_conversations(path: str | Path) -> Iterator[Conversation | BadLine]:
    """Yields each line of a file as it is read; headers and empty lines are left out.

    Raises:
        InputError: the file cannot be read.
    """
    generator = None
    for line, raw in read_lines(Path(path)):
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some editors write
        if not raw.strip():
            continue
        try:
            record = _record(raw)
            of_line = record.get(GENERATOR)
            if not isinstance(of_line, dict):  # none, or that of another program
                of_line = generator
            elif not record.keys() & {"messages", PROMPT_IDS, OUTPUT_IDS, INPUT_IDS, LOSS_MASK}:
                generator = of_line
                continue
            conversation = _conversation(record, line, of_line)
            if b"\\u" in raw:
                _check_unicode(record)
            yield conversation
        except InputError as error:
            yield BadLine(line, str(error))


def nothing_usable(path: str | Path, bad_lines: BadLines) -> InputError:
    """The error for a file without a usable line."""
    if not bad_lines:
        return InputError(f"{path}: empty")
    bad = bad_lines.first[0]
    return InputError(f"{path}: no usable line; line {bad.line}: {bad.reason}")


def question(conversation: Conversation) -> Messages:
    """The messages of a conversation without the answers that it ends with."""
    messages = conversation.messages
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _record(raw: bytes) -> dict[str, Any]:
    require(len(raw) <= LINE_BYTES, f"more than {LINE_BYTES} bytes")
    # Keys that nothing reads may hold NaN, which Python writes.
    record = parse_json(raw, source=None, nonfinite=True)
    if not isinstance(record, dict):
        raise InputError(f"a JSON {type(record).__name__}; expected an object with messages")
    return record


def _conversation(
    record: Mapping[str, Any], line: int, generator: Mapping[str, Any] | None
) -> Conversation:
    """The conversation of a parsed line, or `InputError` with the reason."""
    finished = _finished(record)
    ids, mask = _token_ids(record)
    messages = _messages(record, text=ids is None)
    tools = record.get("tools")
    if tools is not None:
        objects = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        require(objects, f"tools is {shown(tools)}, expected a list of objects")
    prompt_line = record.get(PROMPT_LINE)
    read = set(_LINE_KEYS)
    if not isinstance(record.get(GENERATOR), dict):
        read.discard(GENERATOR)
    if type(prompt_line) is not int:
        read.discard(PROMPT_LINE)
    if ids is None or PROMPT_IDS in record:
        read -= {INPUT_IDS, LOSS_MASK}
    unused = [f"key {key!r}" for key in record if key not in read]
    kwargs = scalars(record.get(KWARGS) or {}, source=KWARGS)
    return Conversation(
        line=line,
        messages=messages,
        tools=tools or None,
        chat_template_kwargs=kwargs,
        finished=finished,
        input_ids=ids,
        loss_mask=mask,
        prompt_line=prompt_line if type(prompt_line) is int else None,
        generator=generator,
        unused=unused,
    )


def _check_unicode(value: Any) -> None:
    """Refuses half a surrogate pair in any text, which JSON can spell and no file can hold."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError("a key or a value is not valid Unicode") from error
    elif isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_unicode(part)


def _finished(record: Mapping[str, Any]) -> bool:
    """Whether the last answer ended by itself."""
    reason, finished = record.get(FINISH_REASON), record.get("finished")
    require(
        reason in (None, "stop", "tool_calls", "length"),
        f"{FINISH_REASON} is {shown(reason)}, expected 'stop', 'tool_calls' or 'length'",
    )
    if finished is None:
        return reason != "length"
    require(isinstance(finished, bool), f"finished is {shown(finished)}, expected true or false")
    require(
        reason is None or finished == (reason != "length"),
        f"finished is {shown(finished)}, {FINISH_REASON} is {shown(reason)}; expected the same",
    )
    return finished


def _token_ids(record: Mapping[str, Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Token ids int32 [n] and their loss mask, bool [n]; None for text."""
    if PROMPT_IDS in record or OUTPUT_IDS in record:
        prompt, output = _integers(record, PROMPT_IDS), _integers(record, OUTPUT_IDS)
        return np.concatenate([prompt, output]), np.arange(len(prompt) + len(output)) >= len(prompt)
    if INPUT_IDS not in record:
        return None, None
    ids, mask = _integers(record, INPUT_IDS), _integers(record, LOSS_MASK)
    require(
        len(ids) == len(mask),
        f"{INPUT_IDS} has {len(ids)} entries, {LOSS_MASK} {len(mask)}; expected as many",
    )
    require(bool(np.isin(mask, (0, 1)).all()), f"{LOSS_MASK} holds a number other than 0 and 1")
    return ids, mask.astype(bool)


def _integers(record: Mapping[str, Any], key: str) -> np.ndarray:
    found = record.get(key)
    inside = isinstance(found, list) and bool(found)
    # By `type`: a mask of true and false is one of 0 and 1, an id is neither.
    kinds = (int, bool) if key == LOSS_MASK else (int,)
    if not inside or any(type(n) not in kinds or not 0 <= n < 2**31 for n in found or ()):
        raise InputError(f"{key} is {shown(found)}, expected a list of integers from 0")
    return np.array(found, np.int32)


def _messages(record: Mapping[str, Any], *, text: bool) -> Messages:
    """The messages of a line, checked; beside token ids they may be absent, and contents empty."""
    found = record.get("messages")
    if found is None and not text:
        return []
    if not isinstance(found, list) or not found:
        raise InputError(
            f"no messages, found {shown(found or list(record))}; expected "
            '{"messages": [{"role": ..., "content": ...}, ...]}'
        )
    messages = []
    asked = False
    for number, message in enumerate(found, start=1):
        if not isinstance(message, dict):
            raise InputError(f"message {number} is not an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise InputError(
                f"message {number} has unknown role {shown(role)}; known: {', '.join(ROLES)}"
            )
        try:
            messages.append(_message(message, role, text=text))
        except InputError as error:
            raise InputError(f"message {number} ({role}) {error}") from error
        asked = asked or role == "user"
        if role == "assistant" and not asked:
            raise InputError(f"message {number} answers, but no message of a user comes before it")
    return messages


def _message(found: Mapping[str, Any], role: str, *, text: bool) -> dict[str, Any]:
    """A message without null keys, its content as text."""
    message = {key: value for key, value in found.items() if value is not None}
    content = message.get("content", "")
    if isinstance(content, list):
        content = _joined(content)
    message["content"] = content
    reasoning = [message[key] for key in REASONING_KEYS if key in message]
    for thought in reasoning:
        require(isinstance(thought, str), f"has a reasoning of {shown(thought)}, expected text")
        require(thought == reasoning[0], "has two reasonings that differ")
    calls = message.get("tool_calls", [])
    named = isinstance(calls, list) and all(map(_call_name, calls))
    require(named, f"has tool_calls {shown(calls)}, expected a list of functions with names")
    if not calls:
        message.pop("tool_calls", None)
    may_be_empty = not text or role == "tool" or any(reasoning) or bool(calls)
    require(isinstance(content, str), f"has content {shown(content)}, expected text")
    require(may_be_empty or bool(content.strip()), "has no content")
    weight = message.get("weight", 1)
    require(weight in (0, 1), f"has weight {shown(weight)}, expected 0 or 1")
    return message


def _joined(parts: Iterable[Any]) -> str:
    """The text of a content that is given in parts."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            raise InputError(f"has a part {shown(part)}, expected parts of type 'text'")
        texts.append(text)
    return "".join(texts)


def _call_name(call: Any) -> str:
    """The name of the function that a tool call calls; empty where there is none."""
    function = call.get("function", call) if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else ""
