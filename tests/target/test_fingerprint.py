"""Fingerprints change with every byte that matters; head and embedding are read without the rest."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import write_target

from domino_jax.strict import InputError
from domino_jax.target.fingerprint import target_fingerprint, tokenizer_fingerprint
from domino_jax.target.load import TABLES, load_tables, load_target, load_tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_target(tmp_path)


def test_fingerprints_follow_the_files(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    model, words = target_fingerprint(directory), tokenizer_fingerprint(directory, tokenizer)
    (directory / "notes.txt").write_text("nothing")
    assert (target_fingerprint(directory), tokenizer_fingerprint(directory, tokenizer)) == (model, words)
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


@pytest.mark.parametrize("shards", [1, 2])
def test_load_tables_reads_what_load_target_reads(directory: Path, shards: int) -> None:
    if shards == 2:
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        places = {name: f"part-{'embed' in name:d}.safetensors" for name in tensors}
        for place in set(places.values()):
            save_file({name: x for name, x in tensors.items() if places[name] == place}, directory / place)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    whole, tables = load_target(directory, dtype="bfloat16"), load_tables(directory, dtype="bfloat16")
    assert tables.config == whole.config and set(tables.params) == set(TABLES)
    for name in TABLES:
        assert tables.params[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(tables.params[name], whole.params[name])


def test_load_tables_refuses(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if name != "lm_head.weight"}, directory / "model.safetensors")
    with pytest.raises(InputError, match="lm_head"):
        load_tables(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"expected model\.safetensors or"):
        load_tables(directory)
