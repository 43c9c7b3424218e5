"""A cache of the target's own greedy answers, which are the same for every draft.

Each set is a file whose name is the hash of all that the answers depend on: another target, prompt,
length, type or version finds another file:

    answers/3f9a....json    {"identity": {...}, "tokens": [[...], ...], "stopped": [...]}
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.base.errors import InputError
from domino_jax.base.files import read_json, write_whole
from domino_jax.base.progress import STDERR, Reporter
from domino_jax.data.template import settings_text
from domino_jax.decoding.generate import Answer


def cached_answers(
    directory: Path,
    identity: Mapping[str, Any],
    compute: Callable[[], Sequence[Answer]],
    *,
    reporter: Reporter = STDERR,
) -> Sequence[Answer]:
    """Answers from a directory, or computed and kept there.

    Args:
        directory: of the user's cache; made where it is missing.
        identity: all that the answers depend on, as plain values.
        compute: decodes them.
        reporter: is told where they cannot be kept.
    """
    text = settings_text(identity)
    path = directory / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    known = _read(path, text) if path.exists() else None
    if known is not None:
        return known
    answers = compute()
    record = {
        "identity": dict(identity),
        "tokens": [answer.tokens.tolist() for answer in answers],
        "stopped": [answer.stopped for answer in answers],
    }
    # A home that cannot be written, as in many a container, is no reason to measure nothing.
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record) + "\n")
    except OSError as error:
        reporter.say(f"{directory}: {error.strerror or error}; the target's answers are not kept")
    return answers


def prompts_sha256(prompts: Sequence[np.ndarray]) -> str:
    """sha256, in hex, of the token ids of prompts, int32 [n] each."""
    text = json.dumps([prompt.tolist() for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path, identity: str) -> list[Answer] | None:
    """The answers of a file; None for one that was not written by `cached_answers`."""
    # A cache that cannot be read is no error: what it held is decoded again.
    try:
        record = read_json(path)
        if settings_text(record["identity"]) != identity:
            return None
        answers = []
        for tokens, stopped in zip(record["tokens"], record["stopped"], strict=True):
            ids = np.array(tokens, np.int32)
            count = max(len(ids) - 1, 0)  # the target alone verifies nothing
            answers.append(Answer(ids, np.zeros(len(ids), bool), bool(stopped), count, count, 0))
        return answers
    except (InputError, KeyError, TypeError, ValueError, OverflowError):
        return None
