"""The record of a draft in a checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from reference import dflash_config, draft_config

from domino_jax.base.errors import InputError
from domino_jax.config.model import DraftConfig
from domino_jax.data.template import ChatTemplate
from domino_jax.training.records import DraftRecord, read_draft_record, recorded_step


def stored(config: DraftConfig, place: Path, **extra: Any) -> Path:
    hashes = {"target_sha256": "1" * 64, "tokenizer_sha256": "2" * 64}
    tree = DraftRecord(config, "target", ChatTemplate("0" * 64, {}), **hashes).as_json(step=7)
    tree["config"] |= extra
    (place / "draft").mkdir()
    (place / "draft" / "metadata").write_text(json.dumps(tree))
    return place


@pytest.mark.parametrize("config", [draft_config(), dflash_config()])
def test_a_stored_draft_is_read_back(config: DraftConfig, tmp_path: Path) -> None:
    record = read_draft_record(stored(config, tmp_path))
    assert recorded_step(tmp_path) == 7
    assert (record.config, record.target_sha256) == (config, "1" * 64)


def test_an_unknown_key_of_a_stored_draft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown key 'num_experts'"):
        read_draft_record(stored(draft_config(), tmp_path, num_experts=8))


@pytest.mark.parametrize("name", ["target_sha256", "tokenizer_sha256", "chat_template"])
def test_a_stored_draft_without_a_hash_is_refused(name: str, tmp_path: Path) -> None:
    metadata = stored(draft_config(), tmp_path) / "draft" / "metadata"
    tree = json.loads(metadata.read_text())
    del tree[name]
    metadata.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=f"draft: '{name}' is missing"):
        read_draft_record(tmp_path)
