"""What a checkpoint says of its draft, by this version and by older ones."""

import json
from pathlib import Path
from typing import Any

import pytest
from reference import dflash_config, draft_config

from domino_jax.base.errors import InputError
from domino_jax.config.model import DraftConfig
from domino_jax.data.template import ChatTemplate
from domino_jax.training.records import DraftRecord, read_draft_record

# As every draft was stored while its config was that of a target with more fields.
BEFORE = {
    "attention_bias": False,
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
}


def stored(config: DraftConfig, place: Path, **before: Any) -> Path:
    tree = DraftRecord(config, "target", ChatTemplate("0" * 64, {})).as_json()
    tree["config"] |= before
    (place / "draft").mkdir()
    (place / "draft" / "metadata").write_text(json.dumps(tree))
    return place


@pytest.mark.parametrize("config", [draft_config(), dflash_config()])
def test_a_draft_of_an_older_version_is_read(config: DraftConfig, tmp_path: Path) -> None:
    before = BEFORE if config.head else BEFORE | {"emb_dim": 256, "gru_hidden_dim": 1024}
    assert read_draft_record(stored(config, tmp_path, **before)).config == config


def test_what_no_version_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown key 'num_experts'"):
        read_draft_record(stored(draft_config(), tmp_path, num_experts=8))
