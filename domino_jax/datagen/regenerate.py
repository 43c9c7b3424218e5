"""A drafter learns the words of its own target, so the target answers whole files of prompts first.

That may take hours, which a stop must not lose, and the answers must be those of one whole start:

    prompts.jsonl -> sorted by length -> batches -> answers.jsonl.partial -> answers.jsonl
                     (then by line)     one after    a `BatchLog`, grows     once the last
                                        the other    batch by batch          batch is there
"""

import functools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.progress import Reporter
from domino_jax.config.run import SEED_LIMIT
from domino_jax.data.conversations import Messages, encode_prompt, read_messages
from domino_jax.datagen.batch_log import BatchLog, log_of
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import check_prompt, generate
from domino_jax.decoding.speculate import required_cache_len


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
    prompts_path: Path,
    answers_path: Path,
    *,
    decoder: Decoder,
    weights: Weights,
    tokenizer: Any,
    settings: AnswerSettings,
    reporter: Reporter,
) -> Regenerated:
    """Writes the target's own answers to the prompts of a file.

    A second start resumes after the last whole batch. Each line of the result is the prompt's line
    with the answer appended to its messages, `prompt_line`, `finished` (False where the answer was
    cut at the limit) and `generator`, the settings. Lines come in the order of the prompts'
    lengths, so that the prompts of a batch share their padding.

    Args:
        prompts_path: JSONL of {"messages": [...]} that end with a user's turn.
        answers_path: the JSONL to write; until it is complete, a `BatchLog`, `.partial`.
        decoder: the plain target as it decodes.
        weights: its parameters.
        tokenizer: its tokenizer.
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
    conversations, bad_lines = read_messages(prompts_path)
    if bad_lines:
        raise InputError(f"{prompts_path}:{bad_lines[0].line}: {bad_lines[0].reason}")
    prompts = []
    for line, messages in conversations:
        ids = encode_prompt(messages, tokenizer, settings.chat_template_kwargs)
        prompts.append(_Prompt(line, messages, ids))
    # The shortest first: those of a batch share their padding. Ties in the order of lines: another
    # start must put the same prompts together into batches.
    prompts.sort(key=lambda prompt: (len(prompt.ids), prompt.line))
    longest = prompts[-1]
    for prompt in reversed(prompts):
        check_prompt(decoder, prompt.ids, tokenizer, source=f"{prompts_path}:{prompt.line}")
    # Of all prompts, not of those that are left: another start must run the same program.
    cache_len = required_cache_len(decoder, len(longest.ids), settings.max_new_tokens)
    answers_path.parent.mkdir(parents=True, exist_ok=True)
    read = functools.partial(_read_answer, prompts=dict(conversations), source=prompts_path)
    kind, generator = "an answer of `domino regenerate`", asdict(settings)
    with BatchLog(partial, read, kind=kind, generator=generator) as log:
        finished = dict(log.finished)
        left = [prompt for prompt in prompts if prompt.line not in finished]
        reporter.say(f"{len(finished)}/{len(prompts)} prompts are answered; compiling")
        written, began = 0, time.monotonic()
        with reporter.bar("prompts", total=len(prompts), done=len(finished)) as bar:
            for first in range(0, len(left), settings.batch_size):
                batch = left[first : first + settings.batch_size]
                answers = generate(
                    decoder,
                    weights,
                    [prompt.ids for prompt in batch],
                    max_new_tokens=settings.max_new_tokens,
                    size=settings.batch_size,
                    cache_len=cache_len,
                    # By the line of a prompt, not by a count: batches that are left keep their
                    # seeds.
                    seed=(settings.seed + batch[0].line) % SEED_LIMIT,
                )
                records = []
                for prompt, answer in zip(batch, answers, strict=True):
                    text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
                    turn = {"role": "assistant", "content": text}
                    records.append(
                        {
                            "messages": [*prompt.messages, turn],
                            "prompt_line": prompt.line,
                            "finished": answer.stopped,
                        }
                    )
                    finished[prompt.line] = answer.stopped
                    written += len(answer.tokens)
                # Before anybody is told of them: the reporter may end the work.
                log.add(records)
                speed = written / (time.monotonic() - began)
                bar.tell(len(finished), f"answered, {written} tokens, {speed:.0f} tokens/s")
        log.publish(answers_path)
    return Regenerated(len(prompts), len(left), list(finished.values()).count(False))


def _read_answer(
    record: dict[str, Any], prompts: dict[int, Messages], source: Path
) -> tuple[int, bool] | None:
    """The prompt's line and whether the answer is finished; None for what is no answer."""
    line, finished = record.get("prompt_line"), record.get("finished")
    messages = record.get("messages")
    # By `type`: to `isinstance` a bool is an int, and true would be taken for line 1.
    if type(line) is not int or type(finished) is not bool:
        return None
    if not isinstance(messages, list) or not messages:
        return None
    if messages[:-1] != prompts.get(line):
        raise InputError(f"answers another prompt than line {line} of {source}")
    return line, finished
