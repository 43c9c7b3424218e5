"""What makes a target and its tokenizer the ones that something was computed with: hashes of their files."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from domino_jax.files import file_sha256


def target_fingerprint(directory: str | Path) -> str:
    """sha256, in hex, over config.json and every safetensors file of a Hugging Face directory, in the order of names.

    Raises:
        InputError: a file cannot be read.
    """
    directory = Path(directory)
    return _hashed([directory / "config.json", *sorted(directory.glob("*.safetensors"))])


def tokenizer_fingerprint(directory: str | Path, tokenizer: Any) -> str:
    """sha256, in hex, over tokenizer.json of a Hugging Face directory and the tokenizer's chat template.

    Raises:
        InputError: the file cannot be read.
    """
    files = _hashed([Path(directory) / "tokenizer.json"])
    return hashlib.sha256(f"{files} {tokenizer.chat_template}".encode()).hexdigest()


@contextmanager
def hashed_beside(directory: str | Path) -> Iterator[Callable[[], str]]:
    """Computes `target_fingerprint` while the body runs; what it yields waits for it and returns it."""
    with ThreadPoolExecutor(1) as thread:
        fingerprint = thread.submit(target_fingerprint, directory)
        yield fingerprint.result


def _hashed(paths: list[Path]) -> str:
    with ThreadPoolExecutor() as threads:  # hashing leaves Python's lock
        return hashlib.sha256(" ".join(threads.map(file_sha256, paths)).encode()).hexdigest()
