"""Token rows of conversations: input ids, and a mask of the tokens that the target generated.

A drafter learns its target's answers as they were generated, after the prompt that the target was
given. Generated ids are rows as they are. Text of an answer is tokenised behind its prompt, which
is rendered as an engine renders it; the template's rendering of a finished conversation is not
used, since it may insert, trim or strip text:

    messages[:t]    -- template, add_generation_prompt -->  prompt  <|im_start|>assistant\\n
    messages[t]     -- content as it was written       -->  answer  It is 4.<|im_end|>
    row of turn t   [ prompt | answer ]   the answer is marked
    turns t < u     one row where the prompt of u begins with the row of t, else a row for each
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domino_jax.base.errors import InputError, Scalars, require, scalars
from domino_jax.data.answer import AnswerFormat
from domino_jax.data.forms import BadLine, BadLines, Conversation, nothing_usable
from domino_jax.data.prefix_tokens import PrefixTokens, tokenize_with_spans
from domino_jax.data.prompt import (
    THINK_BEGIN,
    THINK_END,
    HiddenMessage,
    Prompts,
    kwargs_of,
    stop_token_ids,
)
from domino_jax.data.reading import ALLOW, Reading
from domino_jax.data.rendering import CostlyTemplate
from domino_jax.data.template import (
    HASHES,
    KWARGS,
    NO_KWARGS,
    settings_text,
    tokenizer_record,
    with_date,
)


@dataclass(frozen=True, eq=False)
class Row:
    """One sequence of tokens.

    `input_ids` is int32 [n], `loss_mask` bool [n], True where the target generated the token. A
    row of captured states (`data.hidden_states`) also holds `features` [n, C*D] and, if they were
    captured too, `target_states` [n, D], both float32 or bfloat16. `line` is the conversation's
    line in its file, counted from 1; None for rows that were not read from one.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    features: np.ndarray | None = None
    target_states: np.ndarray | None = None
    line: int | None = None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the row by name, [n, ...] each."""
        return {name: x for name, x in vars(self).items() if isinstance(x, np.ndarray)}


@dataclass(frozen=True)
class RowSet:
    """The rows of a file.

    Attributes:
        rows: in the order of the file.
        reading: counts and report of the file; its bad lines are those without a row, and those
            with an answer that is not trained.
        unfinished: lines whose last answer was cut at its token limit.
        from_text: lines of text, whose tokens are those of the text and not recorded ones.
    """

    rows: list[Row]
    reading: Reading
    unfinished: int
    from_text: int

    @property
    def bad_lines(self) -> BadLines:
        """Of the reading."""
        return self.reading.bad_lines


class Encoded(NamedTuple):
    """The rows of a conversation, and the reasons of answers that are not trained."""

    rows: list[Row]
    untrained: list[str]


def load_rows(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    chat_template_kwargs: Scalars = NO_KWARGS,
    mask_reasoning_content: bool = False,
    end_ids: Sequence[int] = (),
    special_tokens: str = ALLOW,
    progress: Callable[[int], None] = lambda _: None,
) -> RowSet:
    """Reads conversations and encodes them.

    Lines with token ids are taken as they are. An unfinished answer has no end-of-turn token: the
    target did not stop there.

    Args:
        path: JSONL, see `data.forms`.
        tokenizer, max_length, chat_template_kwargs, mask_reasoning_content, end_ids: see `Encoder`.
        special_tokens: see `Reading`.
        progress: receives the number of each line before it is encoded.
    Raises:
        InputError: the file cannot be read, no line of it gives a row, its answers were generated
            with another tokenizer, template or template arguments, or the template breaks its
            limits; as `stop_token_ids`.
    """
    encoder = Encoder(
        tokenizer,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
        mask_reasoning_content=mask_reasoning_content,
        end_ids=end_ids,
    )
    reading = Reading(path, tokenizer, chat_template_kwargs, special_tokens=special_tokens)
    rows: list[Row] = []
    unfinished = from_text = 0
    latest: dict[int, int] = {}  # line of a prompt -> position of the row of its latest turn
    generator = None
    for found in reading.conversations():
        progress(found.line)
        if found.generator is not generator:
            generator = found.generator
            source = f"{path}:{found.line}"
            _check_generator(generator, tokenizer, chat_template_kwargs, source=source)
            latest = {}
        encoded = encoder.rows(found)
        if encoded.untrained:
            reading.bad_lines.add(BadLine(found.line, encoded.untrained[0]))
        unfinished += bool(encoded.rows) and not found.finished
        from_text += found.input_ids is None
        for row in encoded.rows:
            position = latest.get(found.prompt_line) if found.prompt_line is not None else None
            if position is not None and _continues(row, rows[position]):
                rows[position] = _joined(row, rows[position])
            else:
                position = len(rows)
                rows.append(row)
            if found.prompt_line is not None:
                latest[found.prompt_line] = position
    if not rows:
        raise nothing_usable(path, reading.bad_lines)
    return RowSet(rows, reading, unfinished, from_text)


class Encoder:
    """Tokenises conversations and marks the tokens that the target generated.

    The tokens of each answer and the one that ends its turn are marked. An answer is trained only
    if the target can have written it after its prompt, see `rows`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        chat_template_kwargs: Scalars = NO_KWARGS,
        mask_reasoning_content: bool = False,
        end_ids: Sequence[int] = (),
    ) -> None:
        """Probes the chat template for what surrounds an answer.

        Args:
            tokenizer: a transformers fast tokenizer with a chat template.
            max_length: a row keeps its first `max_length` tokens.
            chat_template_kwargs: template arguments besides messages and tools.
            mask_reasoning_content: leave `<think>...</think>` spans of answers unmarked, tags
                included. Their tokens stay in the row. A span that is never closed reaches to the
                end of the turn. An answer that is nothing but reasoning has no marked token.
            end_ids: end tokens of the target, see `stop_token_ids`.
        Raises:
            InputError: as `stop_token_ids`, or the template has no generation prompt where it needs
                one.
        """
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._kwargs = chat_template_kwargs
        self._mask_reasoning_content = mask_reasoning_content
        self._end_ids = end_ids
        self._stop_ids = stop_token_ids(tokenizer, chat_template_kwargs, end_ids=end_ids)
        self._formats: dict[str, AnswerFormat] = {}  # by the template arguments as text
        # For all conversations: a tokenizer takes 20 ms to list thousands of added tokens.
        self._tokens = PrefixTokens(tokenizer)

    def _format(self, kwargs: Scalars) -> AnswerFormat:
        """Answers under template arguments; each probes the template once."""
        name = settings_text(kwargs)
        if name not in self._formats:
            self._formats[name] = AnswerFormat(self._tokenizer, kwargs, end_ids=self._end_ids)
        return self._formats[name]

    def rows(self, conversation: Conversation, *, last: bool = False) -> Encoded:
        """The rows of a conversation, or the one of its last answer.

        An answer is not trained where it has `weight` 0, where a message before it is not in its
        prompt, where it holds an end-of-turn token, where its reasoning or its tool calls are not
        in the template's rendering, and where it contradicts the reasoning tags of its prompt.

        Raises:
            CostlyTemplate: the template breaks its limits.
        """
        if conversation.input_ids is not None:
            assert conversation.loss_mask is not None
            if conversation.messages and conversation.messages[-1].get("weight") == 0:
                return Encoded([], ["every answer has weight 0"])
            row = Row(conversation.input_ids, conversation.loss_mask)
            if self._mask_reasoning_content:
                row = replace(row, loss_mask=self._without_reasoning(row))
            encoded = Encoded([row], [])
        else:
            encoded = self._rows_of_text(conversation, last=last)
        cut, untrained = [], encoded.untrained
        for row in encoded.rows:
            ids, mask = row.input_ids[: self._max_length], row.loss_mask[: self._max_length]
            if mask.any():
                # A view would keep the tokens of the whole conversation.
                cut.append(Row(ids.copy(), mask.copy(), line=conversation.line))
        if not cut and not untrained:
            outside = " outside its reasoning" if self._mask_reasoning_content else ""
            untrained = [f"no token of an answer{outside} among the first {self._max_length}"]
        return Encoded(cut, untrained)

    def _rows_of_text(self, conversation: Conversation, *, last: bool) -> Encoded:
        messages = conversation.messages
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return Encoded([], ["no assistant message"])
        if all(messages[at].get("weight") == 0 for at in answers):
            return Encoded([], ["every answer has weight 0"])
        try:
            kwargs = kwargs_of(conversation, self._tokenizer, self._kwargs)
            answers_of = self._format(kwargs)
        except CostlyTemplate:
            raise
        except InputError as error:
            return Encoded([], [str(error)])
        prompts = Prompts(messages, self._tokenizer, kwargs, tools=conversation.tools)
        rows: list[Row] = []
        untrained = []
        for at in answers[-1:] if last else answers:
            if messages[at].get("weight") == 0:
                continue
            finished = conversation.finished or at != answers[-1]
            asked = np.empty(0, np.int32)
            try:
                prompt = prompts.before(at)
                asked, _ = self._tokens.encode(prompt.text)
                written = answers_of.written(prompt, messages[at], finished=finished)
                turn = self._turn(prompt.text, asked, written, answers_of, finished=finished)
            except CostlyTemplate:  # each further line would take as long
                raise
            except InputError as error:
                untrained.append(f"message {at + 1}: {error}")
                if isinstance(error, HiddenMessage):
                    asked, _ = self._tokens.encode(error.prompt)
            else:
                if rows and _continues(turn, rows[-1]):
                    rows[-1] = _joined(turn, rows[-1])
                else:
                    rows.append(turn)
            # A conversation of a thousand turns costs no more than its first tokens.
            if len(asked) >= self._max_length:
                break
        return Encoded(rows, untrained)

    def _turn(
        self, text: str, prompt: np.ndarray, written: str, answers: AnswerFormat, *, finished: bool
    ) -> Row:
        """The row of one answer, marked, behind the text and the ids of its prompt."""
        if len(prompt) and prompt[-1] in answers.stop_ids:
            raise InputError(
                "the prompt ends with an end of turn, after which nothing is generated"
            )
        whole, ends = self._tokens.encode(text + written)
        answer, ends = whole[len(prompt) :], ends[len(prompt) :] - len(text)
        # No token may span the end of the prompt.
        if not np.array_equal(whole[: len(prompt)], prompt):
            answer, ends = self._tokens_alone(written)
        stops = np.flatnonzero(np.isin(answer, answers.stop_ids))
        if len(stops) and stops[0] < len(answer) - 1:
            token = self._tokenizer.convert_ids_to_tokens(int(answer[stops[0]]))
            raise InputError(f"the answer holds the end-of-turn token {token!r} as text")
        if finished and not len(stops):
            answer = np.append(answer, np.int32(answers.end))
            ends = np.append(ends, len(written) + 1)
        marked = np.ones(len(answer), bool)
        if self._mask_reasoning_content:
            lengths = [0, *ends]
            opened = text.rstrip().endswith(THINK_BEGIN)
            marked = self._outside_reasoning(answer, written, lengths.__getitem__, opened=opened)
        mask = np.concatenate([np.zeros(len(prompt), bool), marked])
        return Row(np.concatenate([prompt, answer]), mask)

    def _tokens_alone(self, written: str) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of an answer without the prefix that tokenizers put at the start of a text."""
        for anchor in ("x", ".", "\n"):
            before, _ = tokenize_with_spans(anchor, self._tokenizer)
            found, spans = tokenize_with_spans(anchor + written, self._tokenizer)
            if np.array_equal(found[: len(before)], before):
                return found[len(before) :], spans[len(before) :, 1] - len(anchor)
        raise InputError("no token border lies between the prompt and the answer")

    def _without_reasoning(self, row: Row) -> np.ndarray:
        """The mask of recorded ids without the reasoning of their answers."""
        mask = row.loss_mask.copy()
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        for begin, end in edges.reshape(-1, 2):
            ids = row.input_ids[begin:end]
            prompt_end = self._decode(row.input_ids[max(begin - 32, 0) : begin])
            opened = prompt_end.rstrip().endswith(THINK_BEGIN)

            def length_of(count: int, ids: np.ndarray = ids) -> int:
                return len(self._decode(ids[:count]))

            mask[begin:end] = self._outside_reasoning(
                ids, self._decode(ids), length_of, opened=opened
            )
        return mask

    def _outside_reasoning(
        self, ids: np.ndarray, text: str, length_of: Callable[[int], int], *, opened: bool
    ) -> np.ndarray:
        """The tokens of an answer outside its reasoning, bool [n].

        Args:
            ids: of the answer, [n].
            text: of the answer.
            length_of: the characters of its first tokens, by their number.
            opened: whether the prompt opens reasoning.
        """
        outside = np.ones(len(ids), bool)
        if len(ids) and ids[-1] in self._stop_ids:
            text = text.removesuffix(self._decode(ids[-1:]))
        counts = range(len(ids) + 1)
        for start, stop in _reasoning_spans(text, opened=opened):
            # The tokens that hold a character of the span.
            first = bisect.bisect_right(counts, start, key=length_of) - 1
            outside[first : bisect.bisect_left(counts, stop, key=length_of)] = False
        return outside

    def _decode(self, ids: np.ndarray) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


def _continues(row: Row, before: Row) -> bool:
    """Whether a row begins with all tokens of an earlier one."""
    count = len(before.input_ids)
    return np.array_equal(row.input_ids[:count], before.input_ids)


def _joined(row: Row, before: Row) -> Row:
    """A row with its own marks and those of the row that it extends."""
    mask = row.loss_mask.copy()
    mask[: len(before.loss_mask)] |= before.loss_mask
    return replace(row, loss_mask=mask)


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


def _check_generator(
    generator: Mapping[str, Any] | None, tokenizer: Any, kwargs: Scalars, *, source: str
) -> None:
    """Refuses answers that were generated with another tokenizer, template or template arguments.

    Files of other programs record none of them.
    """
    if generator is None:
        return
    # Hashing a vocabulary takes a while, and a file may record settings on every line.
    recorded_hashes = HASHES & generator.keys()
    hashes = tokenizer_record(tokenizer) if recorded_hashes else {}
    for name in sorted(recorded_hashes):
        was, now = generator[name], hashes[name]
        require(
            was == now,
            f"{source}: answers of another {name.replace('_', ' ')}: sha256 {str(was)[:12]}, "
            f"the target's is {now[:12]}; give the target that generated them, or regenerate them",
        )
    if KWARGS not in generator:
        return
    recorded = scalars(generator[KWARGS], source=f"{source}: generator: {KWARGS}")
    # Answers of several days train together: their ids are those of their day.
    answered = settings_text(with_date(recorded, kwargs))
    if answered != settings_text(kwargs):
        raise InputError(
            f"{source}: answered with {KWARGS} {answered}, the run has {settings_text(kwargs)}; "
            f"give the run data.{KWARGS} of its answers, or regenerate the answers"
        )
