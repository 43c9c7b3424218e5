"""A cache of the target's own greedy answers, which are the same for every draft.

Each set is a file whose name is the hash of all that the answers depend on: another target, prompt,
length, type or version finds another file:

    answers/3f9a....json    {"identity": {...}, "tokens": [[...], ...], "stopped": [...],
                             "sha256": of the rest}

`evaluate --replay` computes tau from these tokens, so a file that was changed is not used.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError, require
from domino_jax.base.files import MANY_ENTRIES, read_own_json, write_json
from domino_jax.base.progress import STDERR, Reporter
from domino_jax.data.template import settings_text
from domino_jax.decoding.generate import Answer


def cached_answers(
    directory: Path,
    identity: Mapping[str, Any],
    compute: Callable[[], Sequence[Answer]],
    *,
    prompts: int,
    vocab_size: int,
    reporter: Reporter = STDERR,
) -> Sequence[Answer]:
    """Answers from a directory, or computed and kept there.

    Args:
        directory: of the user's cache; made where it is missing.
        identity: all that the answers depend on, as plain values.
        compute: decodes them.
        prompts: number of answers.
        vocab_size: of the target; every token id is below it.
        reporter: receives a line if a file is not used or cannot be written.
    """
    text = settings_text(identity)
    path = directory / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    if path.exists():
        try:
            return _read(path, text, prompts=prompts, vocab_size=vocab_size)
        except InputError as error:
            reporter.say(f"{error}; the target's answers are decoded again")
    answers = compute()
    record = {
        "identity": dict(identity),
        "tokens": [answer.tokens.tolist() for answer in answers],
        "stopped": [answer.stopped for answer in answers],
    }
    # A home that cannot be written, as in many a container, is no reason to measure nothing.
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as error:
        reporter.say(f"{directory}: {error.strerror or error}; the target's answers are not kept")
    return answers


def prompts_sha256(prompts: Sequence[np.ndarray]) -> str:
    """sha256, in hex, of the token ids of prompts, int32 [n] each."""
    text = json.dumps([prompt.tolist() for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, identity: str, *, prompts: int, vocab_size: int) -> list[Answer]:
    """The answers of a file.

    Raises:
        InputError: it is not a file that `cached_answers` wrote for this identity.
    """
    record = read_own_json(path, remedy="not used", entries=MANY_ENTRIES)
    found = settings_text(record.get("identity"))
    require(found == identity, f"{path}: answers of {found[:100]}, expected those of {identity}")
    every, stopped = record.get("tokens"), record.get("stopped")
    if not (isinstance(every, list) and isinstance(stopped, list)):
        raise InputError(f"{path}: expected lists `tokens` and `stopped`")
    counts = len(every), len(stopped)
    require(
        counts == (prompts, prompts),
        f"{path}: {counts[0]} answers and {counts[1]} stops, expected {prompts} of each",
    )
    answers = []
    for number, (tokens, stop) in enumerate(zip(every, stopped, strict=True), start=1):
        # The pass over a prompt gives one token, whatever the limit.
        sound = isinstance(tokens, list) and tokens and type(stop) is bool
        if not sound or not all(type(one) is int and 0 <= one < vocab_size for one in tokens):
            raise InputError(
                f"{path}: answer {number} is not a list of token ids from 0 to {vocab_size - 1}"
            )
        count = len(tokens) - 1  # the target alone verifies nothing
        ids = np.array(tokens, np.int32)
        answers.append(Answer(ids, np.zeros(len(ids), bool), stop, count, count, 0))
    return answers
