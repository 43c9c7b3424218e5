"""A drafter learns the words of its own target, so the target answers whole files of prompts first.

That may take hours, which a stop must not lose, and the answers must be those of one whole start.
One answer alone is streamed, with or without a drafter. A file is answered in this order:

    prompts.jsonl -> sorted by length -> batches -> answers.jsonl.partial -> answers.jsonl
                     (then by line)     one after    a `BatchLog`, grows     once the last
                                        the other    batch by batch          batch is there
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domino_jax.config.run import SEED_LIMIT
from domino_jax.data.conversations import Messages, encode_prompt, read_messages
from domino_jax.data.template import KWARGS, NO_KWARGS
from domino_jax.decoding.batch_log import BatchLog
from domino_jax.decoding.speculate import (
    Decoder,
    DecodeState,
    Weights,
    finish,
    required_slots,
    start,
    stream,
)
from domino_jax.strict import InputError, Scalars

STREAM_CYCLES = 8  # cycles between two pieces of streamed text


class Answer(NamedTuple):
    """One finished row: `tokens` int32 [n] without the prompt, how it ended, and what it took.

    `stopped`: a stop token ended it, and not the limit.
    """

    tokens: np.ndarray
    stopped: bool
    committed: int
    verifications: int
    seconds: float

    @property
    def tau(self) -> float:
        """Tokens committed per verification by the target, its own token included."""
        return self.committed / max(self.verifications, 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answer per second, reading the prompt included."""
        return len(self.tokens) / self.seconds


@dataclass(frozen=True)
class Regenerated:
    """What a file of answers holds: `total`, `answered` by this start, and `cut` at the limit."""

    total: int
    answered: int
    cut: int


def check_length(decoder: Decoder, prompt: np.ndarray, *, place: str) -> None:
    """Refuses a prompt that is longer than any text that the target knows positions for.

    Args:
        decoder: what is to answer it.
        prompt: token ids, int32 [n].
        place: where it comes from, for the message.
    Raises:
        InputError: with both lengths.
    """
    longest = decoder.target.cfg.max_position_embeddings
    if len(prompt) > longest:
        raise InputError(
            f"{place}: a prompt of {len(prompt)} tokens, the target has {longest} positions"
        )


def generate(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    slots: int,
    seed: int = 0,
) -> list[Answer]:
    """Answers a batch of prompts.

    Args:
        decoder: what decodes.
        weights: its parameters.
        prompts: token ids per row.
        max_new_tokens: per answer.
        slots: cache positions, see `speculate.start`.
        seed: of the sampler.
    Returns:
        One `Answer` per prompt; `seconds` is the time of the whole batch.
    """
    began = time.perf_counter()
    state = start(decoder, weights, prompts, max_new_tokens=max_new_tokens, slots=slots, seed=seed)
    state = finish(decoder, weights, state)
    np.asarray(state.lengths)  # waits for the device
    return _answers(decoder, state, prompts, seconds=time.perf_counter() - began)


def stream_text(
    decoder: Decoder,
    weights: Weights,
    tokenizer: Any,
    prompt: np.ndarray,
    *,
    max_new_tokens: int,
    seed: int,
    write: Callable[[str], None],
) -> Answer:
    """Answers one prompt and passes on its text as it comes.

    Args:
        decoder: what decodes.
        weights: its parameters.
        tokenizer: of the target.
        prompt: token ids, int32 [n].
        max_new_tokens: at most.
        seed: of the sampler.
        write: receives each new piece of text.
    Returns:
        The whole `Answer`.
    """
    slots = required_slots(decoder, len(prompt), max_new_tokens)
    began, shown = time.perf_counter(), ""
    first = start(decoder, weights, [prompt], max_new_tokens=max_new_tokens, slots=slots, seed=seed)
    for state in stream(decoder, weights, first, cycles=STREAM_CYCLES):
        ids = np.asarray(state.tokens[0, len(prompt) : int(state.lengths[0])])
        # All of it each time: the text of a token depends on those before it.
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest of its bytes
            write(text[len(shown) :])
            shown = text
    (answer,) = _answers(decoder, state, [prompt], seconds=time.perf_counter() - began)
    # What was held back above: an answer may end within a character.
    write(tokenizer.decode(answer.tokens, skip_special_tokens=True)[len(shown) :])
    return answer


def regenerate(
    decoder: Decoder,
    weights: Weights,
    tokenizer: Any,
    prompts_path: Path,
    answers_path: Path,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    settings: dict[str, Any],
    progress: Callable[[int, int, int], None],
) -> Regenerated:
    """Writes the target's own answers to the prompts of a file.

    A second start resumes after the last whole batch. Each line of the result is the prompt's line
    with the answer appended to its messages, `prompt_line`, `finished` (False where the answer was
    cut at the limit) and `generator`, the settings. Lines come in the order of the prompts'
    lengths, so that the prompts of a batch share their padding.

    Args:
        decoder: the plain target.
        weights: its parameters.
        tokenizer: of the target.
        prompts_path: JSONL of {"messages": [...]} that end with a user's turn.
        answers_path: the JSONL to write; until it is complete, a `BatchLog`, `.partial`.
        max_new_tokens: per answer.
        batch_size: rows decoded together.
        seed: of the sampler.
        settings: what makes the answers, a partial file of other settings is refused; its
            `chat_template_kwargs`, if any, are what the template is told.
        progress: called first and after each batch with prompts done, all prompts and new tokens.
    Returns:
        How many answers there are, and how many of them end without a stop token.
    Raises:
        InputError: unusable prompts, or a partial file of another start that does not fit.
        OSError: the answers cannot be written; those of earlier batches are kept.
    """
    # In the order of what it costs to be refused; nothing is made before all prompts are usable.
    if answers_path.exists():
        raise InputError(f"{answers_path}: already there; remove it to make it again")
    usable = _all_usable(prompts_path)
    prompts = _by_length(usable, tokenizer, settings.get(KWARGS, NO_KWARGS))
    *_, (longest, _, ids) = prompts
    check_length(decoder, ids, place=f"{prompts_path}:{longest}")
    # Of all prompts, not of those that are left: another start must run the same program.
    slots = required_slots(decoder, len(ids), max_new_tokens)
    partial = answers_path.with_name(answers_path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    run = functools.partial(generate, decoder, weights, max_new_tokens=max_new_tokens, slots=slots)
    read = functools.partial(_answer, settings=settings, prompts=usable, prompts_path=prompts_path)
    with BatchLog(partial, read) as log:
        finished = dict(log.finished)
        left = [prompt for prompt in prompts if prompt[0] not in finished]
        written = 0
        progress(len(finished), len(prompts), written)
        for first in range(0, len(left), batch_size):
            batch = left[first : first + batch_size]
            # Short of rows, the last batch repeats one: another batch size is another compilation.
            rows = [ids for _, _, ids in batch] + [batch[-1][2]] * (batch_size - len(batch))
            # By the line of a prompt, not by a count: batches that are left keep their seeds.
            own = (seed + batch[0][0]) % SEED_LIMIT
            answers = run(prompts=rows, seed=own)[: len(batch)]
            # On disk first: the caller's `progress` may end the work.
            log.add(_answer_records(batch, answers, tokenizer, settings))
            written += sum(len(answer.tokens) for answer in answers)
            finished |= {prompt[0]: a.stopped for prompt, a in zip(batch, answers, strict=True)}
            progress(len(finished), len(prompts), written)
        log.publish(answers_path)
    return Regenerated(len(prompts), len(left), list(finished.values()).count(False))


_Prompt = tuple[int, Messages, np.ndarray]  # its line, its messages, its tokens


def _by_length(usable: Mapping[int, Messages], tokenizer: Any, kwargs: Scalars) -> list[_Prompt]:
    """The prompts, the shortest first, so that those of a batch share their padding."""
    prompts = [
        (line, messages, encode_prompt(messages, tokenizer, kwargs))
        for line, messages in usable.items()
    ]
    # Ties in the order of lines: another start must put the same prompts together into batches.
    return sorted(prompts, key=lambda prompt: (len(prompt[2]), prompt[0]))


def _answer_records(
    batch: Sequence[_Prompt],
    answers: Sequence[Answer],
    tokenizer: Any,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """The lines of a batch's answers, in its order."""
    records = []
    for (line, messages, _), answer in zip(batch, answers, strict=True):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        turns = [*messages, {"role": "assistant", "content": text}]
        records.append(_answer_record(turns, line, answer.stopped, settings))
    return records


def _all_usable(prompts_path: Path) -> dict[int, Messages]:
    """Line -> prompt of a file; one that cannot be used is an error."""
    usable, bad_lines = read_messages(prompts_path)
    if bad_lines:
        raise InputError(f"{prompts_path}:{bad_lines[0].line}: {bad_lines[0].reason}")
    return dict(usable)


def _answers(
    decoder: Decoder, state: DecodeState, prompts: Sequence[np.ndarray], *, seconds: float
) -> list[Answer]:
    tokens, lengths = np.asarray(state.tokens), np.asarray(state.lengths)
    committed, verifications = np.asarray(state.committed), np.asarray(state.verifications)
    answers = []
    for row, prompt in enumerate(prompts):
        ids = tokens[row, len(prompt) : lengths[row]]
        stopped = int(ids[-1]) in decoder.stop_ids
        answers.append(Answer(ids, stopped, int(committed[row]), int(verifications[row]), seconds))
    return answers


def _answer_record(
    messages: Messages, line: int, finished: bool, settings: dict[str, Any]
) -> dict[str, Any]:
    return {"messages": messages, "prompt_line": line, "finished": finished, "generator": settings}


def _answer(
    record: Any, settings: dict[str, Any], prompts: dict[int, Messages], prompts_path: Path
) -> tuple[int, bool]:
    """The prompt's line and whether the answer is finished; refuses one of another start."""
    if not isinstance(record, dict) or not isinstance(record.get("generator"), dict):
        raise InputError("not an answer of `domino regenerate`")
    made_with = record["generator"]
    # As text: to a chat template 0 and false are two things, in Python they are equal.
    if json.dumps(made_with, sort_keys=True) != json.dumps(settings, sort_keys=True):
        raise InputError(f"made with {made_with}, not {settings}")
    line, finished, messages = (
        record.get(name) for name in ("prompt_line", "finished", "messages")
    )
    # By `type`: to `isinstance` a bool is an int, and true would be taken for line 1.
    if (
        type(line) is not int
        or type(finished) is not bool
        or not isinstance(messages, list)
        or not messages
    ):
        raise InputError("not an answer of `domino regenerate`")
    if messages[:-1] != prompts.get(line):
        raise InputError(f"answers another prompt than line {line} of {prompts_path}")
    return line, finished
