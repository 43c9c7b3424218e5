"""Tells whether a target and its tokenizer are the ones that something was computed with.

A directory of the same name may hold another model tomorrow. Captured states and checkpoints would
then be used with a target that they do not belong to, and nothing would fail. So both record
hashes of the files that they were computed with, which are compared before they are used.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from domino_jax.base.files import file_sha256


def target_fingerprint(directory: str | Path) -> str:
    """sha256, in hex, of a target: of its config.json and its weights.

    Args:
        directory: in Hugging Face form; every safetensors file of it counts, in the order of names.
    Raises:
        InputError: a file cannot be read.
    """
    directory = Path(directory)
    # Sorted: a file system lists a directory in any order.
    return _hashed([directory / "config.json", *sorted(directory.glob("*.safetensors"))])


def tokenizer_fingerprint(directory: str | Path, tokenizer: Any) -> str:
    """sha256, in hex, of what turns conversations into ids: a tokenizer and its chat template.

    Args:
        directory: in Hugging Face form; its tokenizer.json counts.
        tokenizer: the one that was loaded from it.
    Raises:
        InputError: the file cannot be read.
    """
    # The template as it was loaded: it stands in one of several files, or is one of several.
    files = _hashed([Path(directory) / "tokenizer.json"])
    return hashlib.sha256(f"{files} {tokenizer.chat_template}".encode()).hexdigest()


@contextmanager
def hashed_beside(directory: str | Path) -> Iterator[Callable[[], str]]:
    """Computes `target_fingerprint` while the body runs; what it yields waits and returns it."""
    with ThreadPoolExecutor(1) as thread:
        fingerprint = thread.submit(target_fingerprint, directory)
        yield fingerprint.result


def _hashed(paths: list[Path]) -> str:
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
        hashes = " ".join(threads.map(file_sha256, paths))
    return hashlib.sha256(hashes.encode()).hexdigest()
