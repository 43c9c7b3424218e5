"""What makes a target and its tokenizer the ones that something was computed with: hashes of their files."""

import hashlib
from pathlib import Path
from typing import Any

from domino_jax.strict import InputError


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


def _hashed(paths: list[Path]) -> str:
    parts = []
    for path in paths:
        try:
            with path.open("rb") as file:
                parts.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
