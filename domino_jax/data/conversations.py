"""Conversations become token rows: JSONL of {"messages": [...]} -> ids and loss mask.

A drafter learns what its target says. A mask that covers a role header too, or misses the end of a
turn, teaches it tokens that the target does not write there. Only the chat template knows where an
answer begins and ends, so what it renders is compared and never imitated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domino_jax.base.errors import InputError, Scalars, scalars, shown
from domino_jax.base.files import LINE_BYTES, read_lines
from domino_jax.base.parse import parse_json
from domino_jax.data.rendering import CostlyTemplate, Rendering, render
from domino_jax.data.template import KWARGS, NO_KWARGS, check_kwargs, settings_text

ROLES = ("system", "user", "assistant")

# How reasoning models (DeepSeek-R1, Qwen3) and their chat templates fence what they think.
THINK_BEGIN, THINK_END = "<think>", "</think>"

# {"role": ..., "content": ...}; further keys, as `reasoning_content`, reach the template unchanged
Messages = list[dict[str, Any]]


@dataclass(frozen=True, order=True)
class BadLine:
    """A line of a file that cannot be used; `line` counts from 1."""

    line: int
    reason: str


class MessageSet(NamedTuple):
    """The usable conversations of a file with their line numbers, and the lines left out."""

    conversations: list[tuple[int, Messages]]
    bad_lines: list[BadLine]


@dataclass(frozen=True, eq=False)
class Row:
    """One conversation in tokens.

    `input_ids` is int32 [n], `loss_mask` bool [n], True where the target itself wrote the token. A
    row of captured states (`data.hidden_states`) also holds `features` [n, C*D] and, if they were
    captured too, `target_states` [n, D], both float32 or bfloat16. `line` is where the conversation
    stands in its file, counted from 1; None for rows that were not read from one.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    features: np.ndarray | None = None
    target_states: np.ndarray | None = None
    line: int | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What the row says of its tokens, [n, ...] each, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, np.ndarray)}


class RowSet(NamedTuple):
    """The rows of a file in its order, the lines left out, and how many rows are unfinished."""

    rows: list[Row]
    bad_lines: list[BadLine]
    unfinished: int


def read_messages(path: str | Path) -> MessageSet:
    """Reads conversations or prompts, packed (`.gz`) or not; further keys of a line are ignored.

    Args:
        path: JSONL of {"messages": [{"role": ..., "content": ...}, ...]}; empty lines are skipped.
    Returns:
        What can be used, and per other line its number and what is wrong with it.
    Raises:
        InputError: the file cannot be read or has no usable line.
    """
    records, bad_lines = _read_records(path)
    return MessageSet([(line, record["messages"]) for line, record in records], bad_lines)


def load_rows(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    chat_template_kwargs: Scalars = NO_KWARGS,
    mask_reasoning_content: bool = False,
) -> RowSet:
    """Reads conversations and encodes them.

    A line with `"finished": false` (as `regenerate` writes it for an answer cut at its limit) ends
    without an end-of-turn token: the target did not stop there.

    Args:
        path: JSONL, see `read_messages`.
        tokenizer, max_length, chat_template_kwargs, mask_reasoning_content: see `Encoder`.
    Returns:
        The rows, and per other line its number and what is wrong with it.
    Raises:
        InputError: the file cannot be read, no line of it gives a row, an answer of `regenerate`
            was given under other kwargs, or the template breaks its limits; as `stop_token_ids`.
    """
    records, bad_lines = _read_records(path)
    encoder = Encoder(
        tokenizer,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
        mask_reasoning_content=mask_reasoning_content,
    )
    rows, unfinished = [], 0
    what = "an answer outside its reasoning" if mask_reasoning_content else "an answer"
    for line, record in records:
        _check_answered(record.get("generator"), chat_template_kwargs, source=f"{path}:{line}")
        finished = record.get("finished") is not False
        try:
            row = encoder.row(record["messages"], finished=finished)
        except CostlyTemplate:  # each further line would take as long
            raise
        except InputError as error:
            bad_lines.append(BadLine(line, str(error)))
            continue
        if row is None:
            bad_lines.append(BadLine(line, f"no token of {what} among the first {max_length}"))
        else:
            rows.append(replace(row, line=line))
            unfinished += not finished
    bad_lines.sort()  # those that were not read stand before those that were not encoded
    if not rows:
        raise _nothing_usable(path, bad_lines)
    return RowSet(rows, bad_lines, unfinished)


class Encoder:
    """Renders conversations with the chat template and marks what the assistant wrote.

    The tokens of each answer and the one that ends its turn are marked; neither the role header
    before it nor a newline after it. A token that lies across the start of an answer is not marked:
    the target cannot generate it after the prompt. Nor is an earlier answer whose prompt the
    template renders otherwise once more follows: the target never saw this text before it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        chat_template_kwargs: Scalars = NO_KWARGS,
        mask_reasoning_content: bool = False,
    ) -> None:
        """Finds out what ends an answer.

        Args:
            tokenizer: a transformers fast tokenizer with a chat template.
            max_length: a row keeps its first `max_length` tokens.
            chat_template_kwargs: what the template is told besides the messages.
            mask_reasoning_content: leave `<think>...</think>` spans of answers unmarked, tags
                included, whether they stand in `content` or are rendered from `reasoning_content`.
                Their tokens stay in the row. A span that is never closed reaches to the end of the
                turn. An answer that is nothing but reasoning has no marked token, not even its end
                of turn.
        Raises:
            InputError: as `stop_token_ids`.
        """
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._kwargs = chat_template_kwargs
        self._mask_reasoning_content = mask_reasoning_content
        self._stop_ids = stop_token_ids(tokenizer, chat_template_kwargs)

    def row(self, messages: Messages, *, finished: bool = True) -> Row | None:
        """The row of a conversation with one answer at least; None without a marked token.

        Args:
            messages: the conversation.
            finished: False leaves out the end of turn of the last answer.
        Raises:
            InputError: there is no answer, one holds as text what ends it, or the template does not
                show where the last one begins or where one ends.
        """
        stop_texts = self._tokenizer.convert_ids_to_tokens(list(self._stop_ids))
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        before = [Rendering(messages[:at], generation_prompt=True) for at in answers]
        text, *prompts = render(self._tokenizer, [Rendering(messages), *before], self._kwargs)
        begins = []
        for at, prompt in zip(answers, prompts, strict=True):
            written = messages[at]["content"] + (messages[at].get("reasoning_content") or "")
            for stop in stop_texts:
                if stop in written:
                    raise InputError(
                        f"message {at + 1} holds the end-of-turn token {stop!r} as text"
                    )
            if text.startswith(prompt):
                said = (messages[at]["content"].strip(), THINK_BEGIN)
                # A role header between them would count as part of the answer. Some templates know
                # no generation prompt and need none.
                if not text[len(prompt) :].lstrip().startswith(said):
                    (without,) = render(self._tokenizer, [Rendering(messages[:at])], self._kwargs)
                    if prompt == without:
                        raise InputError(
                            "the chat template ignores add_generation_prompt, which marks where an "
                            "answer begins"
                        )
                begins.append(len(prompt))
            elif at == answers[-1]:
                # An earlier one may be: Qwen3 shows empty thoughts before the last answer alone.
                raise InputError(
                    f"the chat template renders what precedes message {at + 1} otherwise without it"
                )
        if not begins:
            raise InputError("no assistant message")
        ids, spans = _tokenize(text, self._tokenizer)
        mask = np.zeros(len(ids), bool)
        for begin, limit in zip(begins, [*begins[1:], len(text)], strict=True):
            inside = np.flatnonzero((spans[:, 0] >= begin) & (spans[:, 0] < limit))
            stops = inside[np.isin(ids[inside], self._stop_ids)]
            if not len(stops):
                raise InputError("the chat template puts no end-of-turn token after an answer")
            mask[inside[0] : stops[0] + 1] = True
            if self._mask_reasoning_content:
                # A generation prompt may end with the opening tag: the answer begins in reasoning.
                opened = text[:begin].rstrip().endswith(THINK_BEGIN)
                for start, end in _reasoning_spans(text[begin : spans[stops[0], 0]], opened=opened):
                    mask &= (spans[:, 1] <= begin + start) | (spans[:, 0] >= begin + end)
        # The loop ended with the last answer, the one that may be unfinished.
        length = self._max_length if finished else min(self._max_length, int(stops[0]))
        row = Row(ids[:length], mask[:length])
        return row if row.loss_mask.any() else None


def encode_prompt(
    messages: Messages, tokenizer: Any, chat_template_kwargs: Scalars = NO_KWARGS
) -> np.ndarray:
    """The ids that the target continues with its answer.

    Args:
        messages: a conversation that ends before an answer.
        tokenizer: a transformers fast tokenizer with a chat template.
        chat_template_kwargs: what the template is told besides the messages.
    Returns:
        int32 [n], generation prompt included.
    Raises:
        InputError: the last message is an answer already, or the template refuses the conversation.
    """
    if messages[-1]["role"] == "assistant":
        raise InputError("the last message is an answer; a prompt ends with a message of the user")
    (text,) = render(tokenizer, [Rendering(messages, generation_prompt=True)], chat_template_kwargs)
    ids, _ = _tokenize(text, tokenizer)
    return ids


def stop_token_ids(
    tokenizer: Any, chat_template_kwargs: Scalars = NO_KWARGS, *, end_ids: Sequence[int] = ()
) -> tuple[int, ...]:
    """The ids that end an answer: the tokenizer's eos, the template's end of turn, `end_ids`.

    Args:
        tokenizer: a transformers fast tokenizer with a chat template.
        chat_template_kwargs: what the template is told besides the messages.
        end_ids: those that the target's directory names, see `target.tokens.end_token_ids`.
    Returns:
        Each id once.
    Raises:
        InputError: the tokenizer has neither, or its chat template does not read one of the kwargs
            or refuses a plain exchange.
    """
    check_kwargs(tokenizer, chat_template_kwargs)
    # A tokenizer does not name the end of a turn: it is the first added token after an answer.
    answer = "Certainly, here it is"
    exchange = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    (text,) = render(tokenizer, [Rendering(exchange)], chat_template_kwargs)
    if answer not in text:
        raise InputError("the chat template does not show the text of an answer")
    ids, spans = _tokenize(text, tokenizer)
    after = ids[spans[:, 0] >= text.rindex(answer) + len(answer)]
    ends = [int(token) for token in after if int(token) in tokenizer.added_tokens_decoder]
    stops = dict.fromkeys([tokenizer.eos_token_id, *ends[:1], *end_ids])
    stops.pop(None, None)
    if not stops:
        raise InputError(
            "the tokenizer has no eos token and its chat template no token that ends a turn"
        )
    return tuple(stops)


def _reasoning_spans(answer: str, *, opened: bool) -> list[tuple[int, int]]:
    """Characters of an answer that are reasoning, end exclusive; the last may reach beyond it."""
    beyond = len(answer) + 1  # the end of the turn as well
    spans = []
    start = 0 if opened else answer.find(THINK_BEGIN)
    while start >= 0:
        close = answer.find(THINK_END, start)
        spans.append((start, beyond if close < 0 else close + len(THINK_END)))
        start = answer.find(THINK_BEGIN, spans[-1][1])
    bounds = [0, *(bound for span in spans for bound in span), beyond]
    outside = "".join(
        answer[begin:end] for begin, end in zip(bounds[::2], bounds[1::2], strict=True)
    )
    return spans if outside.strip() else [(0, beyond)]


def _check_answered(generator: Any, kwargs: Scalars, *, source: str) -> None:
    """Refuses an answer that `regenerate` asked for under another setting."""
    if not isinstance(generator, dict) or KWARGS not in generator:  # of another program
        return
    recorded = scalars(generator[KWARGS], source=f"{source}: generator: {KWARGS}")
    answered = settings_text(recorded)
    if answered != settings_text(kwargs):
        raise InputError(
            f"{source}: answered with {KWARGS} {answered}, the run has {settings_text(kwargs)}; "
            f"give the run data.{KWARGS} of its answers, or make the answers again"
        )


def _tokenize(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The ids int32 [n] of rendered text and the characters int64 [n, 2] of each, end exclusive."""
    # The template wrote the special tokens; verbose would warn of long rows, which are cut later.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return np.array(encoded["input_ids"], np.int32), spans


def _read_records(path: str | Path) -> tuple[list[tuple[int, dict[str, Any]]], list[BadLine]]:
    records, bad_lines = [], []
    for line, raw in read_lines(Path(path)):
        if line == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some editors write
        if not raw.strip():
            continue
        try:
            records.append((line, _usable_record(raw)))
        except InputError as error:
            bad_lines.append(BadLine(line, str(error)))
    if not records:
        raise _nothing_usable(path, bad_lines)
    return records, bad_lines


def _usable_record(raw: bytes) -> dict[str, Any]:
    """The parsed line, or `InputError` with what is wrong with it."""
    if len(raw) > LINE_BYTES:
        raise InputError(f"more than {LINE_BYTES} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("not UTF-8") from error
    # What else a line holds is nobody's business, NaN included, which Python writes.
    record = parse_json(text, source=None, nonfinite=True)
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InputError('no messages; expected {"messages": [{"role": ..., "content": ...}, ...]}')
    asked = False
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise InputError(f"message {number} is not an object with role and content")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(
                f"message {number} has unknown role {shown(role)}; known: {', '.join(ROLES)}"
            )
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"message {number} ({role}) has no content")
        reasoning = message.get("reasoning_content")
        if reasoning is not None and not isinstance(reasoning, str):
            raise InputError(f"message {number} ({role}) has a reasoning_content that is not text")
        try:
            (content + (reasoning or "")).encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise InputError(f"message {number} ({role}) is not valid Unicode") from error
        asked = asked or role == "user"
        if role == "assistant" and not asked:
            raise InputError(f"message {number} answers, but no message of a user comes before it")
    if not isinstance(record.get("finished", True), bool):
        raise InputError(f"finished is {shown(record['finished'])}, expected true or false")
    return record


def _nothing_usable(path: str | Path, bad_lines: Sequence[BadLine]) -> InputError:
    if not bad_lines:
        return InputError(f"{path}: empty")
    return InputError(f"{path}: no usable line; line {bad_lines[0].line}: {bad_lines[0].reason}")
