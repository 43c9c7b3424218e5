"""A drafter learns the words of its own target, so the target answers whole files of prompts first.

That may take hours, which a stop must not lose, and the answers must be those of one whole start:

    prompts.jsonl -> sorted by length -> batches -> answers.jsonl.partial -> answers.jsonl
                     (then by line)     one after    a `BatchLog`, grows     once the last
                                        the other    batch by batch          batch is there
"""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.progress import STDERR, Reporter
from domino_jax.config.run import SEED_LIMIT
from domino_jax.data.conversations import Messages, encode_prompt, read_messages
from domino_jax.data.template import settings_text
from domino_jax.datagen.batch_log import BatchLog, log_of
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import Answer, check_length, generate
from domino_jax.decoding.speculate import required_cache_len

_NO_ANSWER = "not an answer of `domino regenerate`"


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """What answers depend on besides their prompts; each line of them records it.

    A start with other settings would mix two sets. With a temperature an answer depends on the
    batch that it is drawn in, so the size of a batch is one of them.
    """

    target: str
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    dtype: str
    batch_size: int
    chat_template_kwargs: Scalars


@dataclass(frozen=True)
class Answerer:
    """Who answers: the plain target as it decodes, its parameters and its tokenizer."""

    decoder: Decoder
    weights: Weights
    tokenizer: Any


@dataclass(frozen=True)
class Regenerated:
    """What a file of answers holds: `total`, `answered` by this start, and `cut` at the limit."""

    total: int
    answered: int
    cut: int


@dataclass(frozen=True)
class _Prompt:
    """A prompt of the file: its line, its messages and their tokens, int32 [n]."""

    line: int
    messages: Messages
    ids: np.ndarray


def regenerate(
    answerer: Answerer,
    prompts_path: Path,
    answers_path: Path,
    *,
    settings: AnswerSettings,
    reporter: Reporter = STDERR,
) -> Regenerated:
    """Writes the target's own answers to the prompts of a file.

    A second start resumes after the last whole batch. Each line of the result is the prompt's line
    with the answer appended to its messages, `prompt_line`, `finished` (False where the answer was
    cut at the limit) and `generator`, the settings. Lines come in the order of the prompts'
    lengths, so that the prompts of a batch share their padding.

    Args:
        answerer: the plain target.
        prompts_path: JSONL of {"messages": [...]} that end with a user's turn.
        answers_path: the JSONL to write; until it is complete, a `BatchLog`, `.partial`.
        settings: how it answers.
        reporter: is told each batch that is answered.
    Returns:
        How many answers there are, and how many of them end without a stop token.
    Raises:
        InputError: a place that is taken or called packed, unusable prompts, or a partial file of
            another start that does not fit.
        OSError: the answers cannot be written; those of earlier batches are kept.
    """
    # In the order of what it costs to be refused; nothing is made before all prompts are usable.
    partial = log_of(answers_path)
    usable = _all_usable(prompts_path)
    prompts = _by_length(usable, answerer.tokenizer, settings.chat_template_kwargs)
    longest = prompts[-1]
    check_length(answerer.decoder, longest.ids, source=f"{prompts_path}:{longest.line}")
    # Of all prompts, not of those that are left: another start must run the same program.
    cache_len = required_cache_len(answerer.decoder, len(longest.ids), settings.max_new_tokens)
    answers_path.parent.mkdir(parents=True, exist_ok=True)
    read = functools.partial(_read_answer, settings=settings, prompts=usable, source=prompts_path)
    with BatchLog(partial, read) as log:
        finished = dict(log.finished)
        left = [prompt for prompt in prompts if prompt.line not in finished]
        reporter.say(f"{len(finished)}/{len(prompts)} prompts are answered; compiling")
        written, began = 0, time.monotonic()
        with reporter.bar("prompts", total=len(prompts), done=len(finished)) as bar:
            for first in range(0, len(left), settings.batch_size):
                batch = left[first : first + settings.batch_size]
                answers = _logged_answers(
                    log, answerer, batch, settings=settings, cache_len=cache_len
                )
                written += sum(len(answer.tokens) for answer in answers)
                for prompt, answer in zip(batch, answers, strict=True):
                    finished[prompt.line] = answer.stopped
                speed = written / (time.monotonic() - began)
                bar.tell(len(finished), f"answered, {written} tokens, {speed:.0f} tokens/s")
        log.publish(answers_path)
    return Regenerated(len(prompts), len(left), list(finished.values()).count(False))


def _all_usable(prompts_path: Path) -> dict[int, Messages]:
    """Line -> prompt of a file; one that cannot be used is an error."""
    usable, bad_lines = read_messages(prompts_path)
    if bad_lines:
        raise InputError(f"{prompts_path}:{bad_lines[0].line}: {bad_lines[0].reason}")
    return dict(usable)


def _by_length(usable: Mapping[int, Messages], tokenizer: Any, kwargs: Scalars) -> list[_Prompt]:
    """The prompts, the shortest first, so that those of a batch share their padding."""
    prompts = []
    for line, messages in usable.items():
        ids = encode_prompt(messages, tokenizer, kwargs)
        prompts.append(_Prompt(line, messages, ids))
    # Ties in the order of lines: another start must put the same prompts together into batches.
    return sorted(prompts, key=lambda prompt: (len(prompt.ids), prompt.line))


def _logged_answers(
    log: BatchLog,
    answerer: Answerer,
    batch: Sequence[_Prompt],
    *,
    settings: AnswerSettings,
    cache_len: int,
) -> list[Answer]:
    """The answers of a batch; they are on disk when this returns."""
    answers = _answers(answerer, batch, settings=settings, cache_len=cache_len)
    # Before anybody is told of them: the reporter may end the work.
    log.add(_lines(batch, answers, answerer.tokenizer, settings))
    return answers


def _answers(
    answerer: Answerer, batch: Sequence[_Prompt], *, settings: AnswerSettings, cache_len: int
) -> list[Answer]:
    """The answers of a batch, in its order."""
    return generate(
        answerer.decoder,
        answerer.weights,
        [prompt.ids for prompt in batch],
        max_new_tokens=settings.max_new_tokens,
        size=settings.batch_size,
        cache_len=cache_len,
        # By the line of a prompt, not by a count: batches that are left keep their seeds.
        seed=(settings.seed + batch[0].line) % SEED_LIMIT,
    )


def _lines(
    batch: Sequence[_Prompt], answers: Sequence[Answer], tokenizer: Any, settings: AnswerSettings
) -> list[dict[str, Any]]:
    """The lines of a batch's answers, in its order."""
    lines = []
    for prompt, answer in zip(batch, answers, strict=True):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        lines.append(
            {
                "messages": [*prompt.messages, {"role": "assistant", "content": text}],
                "prompt_line": prompt.line,
                "finished": answer.stopped,
                "generator": asdict(settings),
            }
        )
    return lines


def _read_answer(
    record: Any, settings: AnswerSettings, prompts: dict[int, Messages], source: Path
) -> tuple[int, bool]:
    """The prompt's line and whether the answer is finished; refuses one of another start."""
    if not isinstance(record, dict) or not isinstance(record.get("generator"), dict):
        raise InputError(_NO_ANSWER)
    made_with = record["generator"]
    asked = asdict(settings)
    if settings_text(made_with) != settings_text(asked):
        raise InputError(f"made with {made_with}, not {asked}")
    line = record.get("prompt_line")
    finished = record.get("finished")
    messages = record.get("messages")
    # By `type`: to `isinstance` a bool is an int, and true would be taken for line 1.
    if type(line) is not int or type(finished) is not bool:
        raise InputError(_NO_ANSWER)
    if not isinstance(messages, list) or not messages:
        raise InputError(_NO_ANSWER)
    if messages[:-1] != prompts.get(line):
        raise InputError(f"answers another prompt than line {line} of {source}")
    return line, finished
