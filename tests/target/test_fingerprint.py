"""Fingerprints change with every byte that matters."""

from pathlib import Path

import pytest
from tiny import write_target

from domino_jax.base.errors import InputError
from domino_jax.target.fingerprint import target_fingerprint, tokenizer_fingerprint
from domino_jax.target.load import load_tokenizer


def test_fingerprints_follow_the_files(tmp_path: Path) -> None:
    directory = write_target(tmp_path)
    tokenizer = load_tokenizer(directory)
    model, words = target_fingerprint(directory), tokenizer_fingerprint(directory, tokenizer)
    (directory / "notes.txt").write_text("nothing")
    assert target_fingerprint(directory) == model
    assert tokenizer_fingerprint(directory, tokenizer) == words
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(directory, tokenizer) != words
    weights = directory / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert target_fingerprint(directory) != model
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: No such file"):
        target_fingerprint(directory)
