"""Answers of the target to a file of prompts, with the token ids that it was given and generated.

Generating may take hours. A stopped start is resumed and ends with the file of an uninterrupted
one. Turns of a conversation are answered one after the other: the prompt of a turn holds the
target's answers to the turns before it.

    prompts.jsonl -> turn 1 of each, by length -> batches -> answers.jsonl.partial -> answers.jsonl
                     turn 2 of each, by length -> ...        a `BatchLog`             once all are
                                                                                      answered
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, Scalars, require
from domino_jax.base.progress import Reporter
from domino_jax.config.run import SEED_LIMIT
from domino_jax.data.conversations import Encoder
from domino_jax.data.forms import (
    FINISH_REASON,
    OUTPUT_IDS,
    PROMPT_IDS,
    PROMPT_LINE,
    BadLine,
    Conversation,
    Messages,
    iterate_conversations,
    nothing_usable,
    question,
)
from domino_jax.data.prefix_tokens import PrefixTokens
from domino_jax.data.prompt import Prompts, check_asked, encode_prompt, kwargs_of
from domino_jax.data.reading import Reading
from domino_jax.data.template import KWARGS, settings_text, tokenizer_record
from domino_jax.datagen.batch_log import BatchLog, log_of
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import Answer, check_prompt, generate
from domino_jax.decoding.speculate import required_cache_len

_TURN_SEEDS = 1_000_003  # seed offset of a turn: turns of one line draw differently
_PLACEHOLDER = "Okay."  # an answer of a turn that is rendered before it is answered


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Settings of answers, which the header of their file records.

    A start with other settings would mix two sets. With a temperature an answer depends on its
    batch, so the batch size is one of them.
    """

    target: str
    turns: str
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    dtype: str
    batch_size: int
    chat_template_kwargs: Scalars


@dataclass(frozen=True)
class Regenerated:
    """Counts of a file of answers.

    Attributes:
        total: answers in the file.
        answered: answers of this start.
        cut: answers that reached the token limit.
        retokenised: of `answered`, those whose text gives other ids when it is tokenised again.
        left_out: later turns whose prompt was too long or refused by the template.
    """

    total: int
    answered: int
    cut: int
    retokenised: int
    left_out: int


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A conversation to answer, turn by turn.

    Attributes:
        line: of the file of prompts, from 1.
        turns: the messages of each turn; they follow the answer to the turn before.
        first_ids: the prompt of the first turn, int32 [n].
        tools: JSON schemas of the tools that the template prints.
        chat_template_kwargs: of the line; they override those of the settings.
    """

    line: int
    turns: Sequence[Messages]
    first_ids: np.ndarray
    tools: Sequence[Any] | None
    chat_template_kwargs: Scalars

    def messages(self, answers: Iterable[str]) -> Messages:
        """The messages up to a turn, with the answers to the turns before it."""
        messages = list(self.turns[0])
        for text, turn in zip(answers, self.turns[1:], strict=False):
            messages += [{"role": "assistant", "content": text}, *turn]
        return messages


@dataclass(frozen=True)
class _Prompt:
    """The prompt of a turn: its dialogue, the messages before the answer, and their ids [n]."""

    dialogue: Dialogue
    messages: Messages
    ids: np.ndarray

    @property
    def key(self) -> tuple[int, int]:
        """Line and number of messages, unique in a file."""
        return self.dialogue.line, len(self.messages)


def read_dialogues(
    path: Path, decoder: Decoder, tokenizer: Any, *, settings: AnswerSettings, reporter: Reporter
) -> list[Dialogue]:
    """Reads a file of prompts and renders each turn once; no weights are needed.

    Answers at the end of a conversation are left out. With `turns` "all" earlier answers are
    generated again; those that call tools stay, since the results after them are theirs.

    Args:
        path: JSONL of {"messages": [...]}.
        decoder: the plain target as it decodes.
        tokenizer: its tokenizer.
        settings: of the answers; `turns` is "all", or "last" to keep earlier answers.
        reporter: receives the number of answers that are left out, and keys that nothing reads.
    Raises:
        InputError: a line that is unusable, that the chat template refuses, or whose prompt is too
            long, with its number.
    """
    total = 0
    # Before any is rendered, which may take minutes.
    for found in iterate_conversations(path):
        if isinstance(found, BadLine):
            raise InputError(f"{path}:{found.line}: {found.reason}")
        total = found.line
    reading = Reading(path, tokenizer, settings.chat_template_kwargs)
    tokens = PrefixTokens(tokenizer)
    dialogues = []
    replaced = 0
    with reporter.bar("lines", total=total) as bar:
        for conversation in reading.conversations():
            bar.update(conversation.line)
            source = f"{path}:{conversation.line}"
            try:
                dialogue = _dialogue(
                    conversation, tokenizer, settings, decoder=decoder, tokens=tokens
                )
            except InputError as error:
                raise InputError(f"{source}: {error}") from error
            check_prompt(decoder, dialogue.first_ids, tokenizer, source=source)
            dialogues.append(dialogue)
            replaced += len(conversation.messages) - sum(map(len, dialogue.turns))
    if not dialogues:
        raise nothing_usable(path, reading.bad_lines)
    if replaced:
        reporter.say(f"{path}: {replaced} answers in it are left out and generated again")
    for words in reading.report():
        reporter.say(words)
    return dialogues


def regenerate(
    dialogues: Sequence[Dialogue],
    answers_path: Path,
    *,
    source: Path,
    decoder: Decoder,
    weights: Weights,
    tokenizer: Any,
    settings: AnswerSettings,
    reporter: Reporter,
) -> Regenerated:
    """Writes the target's own answers to the turns of all dialogues.

    A second start resumes after the last whole batch. The first line of the result is a header,
    `generator`, with the settings, the hashes of vocabulary and template, and the versions. Each
    further line is an answer: the messages up to it, `prompt_line`, `prompt_ids`, `output_ids` and
    `finish_reason` ("stop", or "length" at the limit). Lines come in the order of the prompts'
    lengths, so that the prompts of a batch share their padding.

    Args:
        dialogues: of `read_dialogues`.
        answers_path: the JSONL to write; until it is complete, a `BatchLog`, `.partial`.
        source: the file of the dialogues, for messages.
        decoder: the plain target as it decodes.
        weights: its parameters.
        tokenizer: its tokenizer.
        settings: of the answers.
        reporter: receives each batch that is answered.
    Raises:
        InputError: an answers file that exists or is called packed, a partial file of another
            start, or logits that are not finite.
        OSError: the answers cannot be written; those of earlier batches are kept.
    """
    partial = log_of(answers_path)
    answers_path.parent.mkdir(parents=True, exist_ok=True)
    record = _AnswerRecords(dialogues, source)
    generator = asdict(settings) | tokenizer_record(tokenizer)
    encoder = Encoder(
        tokenizer,
        max_length=decoder.target.cfg.max_position_embeddings,
        chat_template_kwargs=settings.chat_template_kwargs,
        end_ids=decoder.stop_ids,
    )
    total = sum(len(dialogue.turns) for dialogue in dialogues)
    answered = tokens = retokenised = left_out = 0
    began = time.monotonic()
    with (
        BatchLog(
            partial, record.read, kind="an answer of `domino regenerate`", generator=generator
        ) as log,
        reporter.bar("answers", total=total, done=len(log.finished)) as bar,
    ):
        finished = dict(log.finished)
        reporter.say(f"{len(finished)}/{total} answers are there; compiling")
        for turn in range(max(len(dialogue.turns) for dialogue in dialogues)):
            prompts, refused = record.prompts(turn, decoder, tokenizer, settings)
            left_out += refused
            left = [prompt for prompt in prompts if prompt.key not in finished]
            if not left:
                continue
            # Of all prompts, not of those that are left: another start runs the same program.
            longest = max(len(prompt.ids) for prompt in prompts)
            cache_len = required_cache_len(decoder, longest, settings.max_new_tokens)
            for first in range(0, len(left), settings.batch_size):
                batch = left[first : first + settings.batch_size]
                # By the line of a prompt, not by a count: later batches keep their seeds.
                seed = settings.seed + batch[0].dialogue.line + turn * _TURN_SEEDS
                answers = generate(
                    decoder,
                    weights,
                    [prompt.ids for prompt in batch],
                    max_new_tokens=settings.max_new_tokens,
                    size=settings.batch_size,
                    cache_len=cache_len,
                    seed=seed % SEED_LIMIT,
                )
                lines = []
                for prompt, answer in zip(batch, answers, strict=True):
                    line = record.line(prompt, answer, tokenizer)
                    lines.append(line)
                    finished[prompt.key] = answer.stopped
                    tokens += len(answer.tokens)
                    retokenised += is_retokenised(line, encoder)
                answered += len(batch)
                # Before it is reported: the reporter may end the work.
                log.add(lines)
                speed = tokens / (time.monotonic() - began)
                bar.tell(len(finished), f"answered, {tokens} tokens, {speed:.0f} tokens/s")
        log.publish(answers_path)
    cut = list(finished.values()).count(False)
    return Regenerated(len(finished), answered, cut, retokenised, left_out)


class _AnswerRecords:
    """The lines of answers, written and read again, and the prompts that follow from them."""

    def __init__(self, dialogues: Sequence[Dialogue], source: Path) -> None:
        self._dialogues = {dialogue.line: dialogue for dialogue in dialogues}
        self._source = source
        # Text of the answers that a later turn follows, by line.
        self._texts: dict[int, list[str]] = {dialogue.line: [] for dialogue in dialogues}

    def prompts(
        self, turn: int, decoder: Decoder, tokenizer: Any, settings: AnswerSettings
    ) -> tuple[list[_Prompt], int]:
        """The prompts of a turn, the shortest first, and how many are too long or refused."""
        prompts, refused = [], 0
        for dialogue in self._dialogues.values():
            answers = self._texts[dialogue.line][:turn]
            if turn >= len(dialogue.turns):
                continue
            if len(answers) < turn:  # the turn before was refused
                refused += 1
                continue
            messages = dialogue.messages(answers)
            if turn == 0:
                prompts.append(_Prompt(dialogue, messages, dialogue.first_ids))
                continue
            kwargs = {**settings.chat_template_kwargs, **dialogue.chat_template_kwargs}
            try:
                ids = encode_prompt(messages, tokenizer, kwargs, tools=dialogue.tools)
                check_prompt(decoder, ids, tokenizer, source=f"{self._source}:{dialogue.line}")
            except InputError:
                refused += 1
                continue
            prompts.append(_Prompt(dialogue, messages, ids))
        # Ties in the order of lines: another start must make the same batches.
        prompts.sort(key=lambda prompt: (len(prompt.ids), prompt.dialogue.line))
        return prompts, refused

    def line(self, prompt: _Prompt, answer: Answer, tokenizer: Any) -> dict[str, Any]:
        """The line of an answer."""
        dialogue = prompt.dialogue
        # With special tokens, which calls of tools begin with; without the end of the turn.
        text = tokenizer.decode(
            answer.tokens[: len(answer.tokens) - answer.stopped],
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        self._note(dialogue, text)
        own = {"tools": dialogue.tools, KWARGS: dict(dialogue.chat_template_kwargs)}
        return {
            "messages": [*prompt.messages, {"role": "assistant", "content": text}],
            **{key: value for key, value in own.items() if value},
            PROMPT_LINE: dialogue.line,
            PROMPT_IDS: prompt.ids.tolist(),
            OUTPUT_IDS: answer.tokens.tolist(),
            FINISH_REASON: "stop" if answer.stopped else "length",
        }

    def read(self, record: dict[str, Any]) -> tuple[tuple[int, int], bool] | None:
        """The key of a line and whether its answer is finished; None for another line."""
        line, reason = record.get(PROMPT_LINE), record.get(FINISH_REASON)
        messages = record.get("messages")
        # By `type`: to `isinstance` a bool is an int, and true would be taken for line 1.
        if type(line) is not int or reason not in ("stop", "length"):
            return None
        if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
            return None
        dialogue = self._dialogues.get(line)
        found = [messages[:-1], record.get("tools"), record.get(KWARGS, {})]
        expected = dialogue and [
            dialogue.messages(self._texts[line]),
            dialogue.tools,
            dict(dialogue.chat_template_kwargs),
        ]
        # As text: NaN differs from itself.
        if dialogue is None or settings_text(found) != settings_text(expected):
            raise InputError(f"answers another prompt than line {line} of {self._source}")
        self._note(dialogue, str(messages[-1].get("content")))
        return (line, len(messages) - 1), reason == "stop"

    def _note(self, dialogue: Dialogue, text: str) -> None:
        texts = self._texts[dialogue.line]
        if len(texts) < len(dialogue.turns) - 1:
            texts.append(text)


def _dialogue(
    conversation: Conversation,
    tokenizer: Any,
    settings: AnswerSettings,
    *,
    decoder: Decoder,
    tokens: PrefixTokens,
) -> Dialogue:
    """The turns of a conversation, each rendered once with placeholders as answers.

    Turns after the first one that is longer than the target's positions are not rendered.
    """
    asked = question(conversation)
    require(bool(asked), "no messages before the answer")
    parts: list[Messages] = [[]]
    for message in asked:
        again = message["role"] == "assistant" and "tool_calls" not in message
        if settings.turns == "last" or not again:
            parts[-1].append(message)
        elif parts[-1]:  # consecutive answers are one turn
            parts.append([])
    dialogue = Dialogue(
        line=conversation.line,
        turns=parts,
        first_ids=np.empty(0, np.int32),
        tools=conversation.tools,
        chat_template_kwargs=conversation.chat_template_kwargs,
    )
    kwargs = kwargs_of(conversation, tokenizer, settings.chat_template_kwargs)
    whole = dialogue.messages([_PLACEHOLDER] * (len(parts) - 1))
    prompts = Prompts(whole, tokenizer, kwargs, tools=conversation.tools)
    count = 0
    for turn, part in enumerate(parts):
        check_asked(part)
        count += len(part)
        ids, _ = tokens.encode(prompts.before(count).text)
        if turn == 0:
            dialogue = replace(dialogue, first_ids=ids)
        if len(ids) > decoder.target.cfg.max_position_embeddings:
            break
        count += 1  # the placeholder
    return dialogue


def is_retokenised(line: Mapping[str, Any], encoder: Encoder) -> bool:
    """Whether the text of an answer's line, tokenised again, gives other ids than were generated.

    Args:
        line: of a file that `regenerate` wrote.
        encoder: of the same target and template arguments.
    """
    conversation = Conversation(
        line=line[PROMPT_LINE],
        messages=line["messages"],
        tools=line.get("tools"),
        chat_template_kwargs=line.get(KWARGS, {}),
        finished=line[FINISH_REASON] == "stop",
    )
    rows = encoder.rows(conversation, last=True).rows
    return not rows or rows[-1].input_ids.tolist() != line[PROMPT_IDS] + line[OUTPUT_IDS]
