"""The config.json of an export: what every reader of the format insists on."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from exports import CONFIG, PLAIN, SHIFTED_DFLASH, SLIDING, params_of
from reference import draft_config
from transformers import Qwen3Config

from domino_jax.base.errors import InputError
from domino_jax.config.heads import HEADS
from domino_jax.config.model import SIZES, DraftConfig, RopeScaling
from domino_jax.interop.hf import load_hf_draft, save_hf_draft
from domino_jax.interop.hf_config import config_from_json, config_json

MIXED = ("full_attention", "sliding_attention")


@pytest.mark.parametrize(
    ("changes", "is_causal"),
    [
        ({"layer_types": SLIDING}, False),
        ({"layer_types": SLIDING, "sliding_in_block": "causal"}, None),
        ({"layer_types": MIXED, "sliding_in_block": "causal"}, None),
        ({"layer_types": MIXED}, False),
    ],
)
def test_windows_are_written_as_their_readers_take_them(
    changes: dict[str, Any], is_causal: bool | None, tmp_path: Path
) -> None:
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    config = draft_config(sliding_window=6, **changes)
    save_hf_draft(tmp_path / "draft", config, params_of(config))
    tree = json.loads((tmp_path / "draft" / "config.json").read_text())
    # Without the keys z-lab, SGLang and vLLM take a sliding layer as causal, NeMo no layer;
    # vLLM asks both.
    assert tree.get("is_causal") is tree["dflash_config"].get("causal") is is_causal
    assert (tree["use_sliding_window"], tree["sliding_window"]) == (True, 6)
    settings = Qwen3DFlashDraftModel.config_class.from_pretrained(tmp_path / "draft")
    windows = [layer.self_attn.sliding_window for layer in Qwen3DFlashDraftModel(settings).layers]
    assert windows == [6 if kind == SLIDING[0] else None for kind in config.layer_types]
    assert load_hf_draft(tmp_path / "draft")[0] == config


@pytest.mark.pitfall(
    "shift_label missing from the saved config",
    seen="interop/hf_config.py: shift_label not written (what was saved does not read back)",
)
@pytest.mark.pitfall(
    "rotary base or partial factor read from the wrong key, or written under one key only",
    seen="interop/hf_config.py: no base in rope_parameters",
)
@pytest.mark.parametrize("shift_label", [False, True])
def test_config_json_has_what_every_reader_insists_on(shift_label: bool, tmp_path: Path) -> None:
    config = draft_config(shift_label=shift_label)
    save_hf_draft(tmp_path / "draft", config, params_of(CONFIG))
    tree = json.loads((tmp_path / "draft" / "config.json").read_text())
    nested = tree["dflash_config"]
    # SpecForge
    assert nested["projector_type"] == "domino"
    assert (nested["emb_dim"], nested["gru_hidden_dim"]) == (12, 20)
    # NeMo and tpu-inference look for the block size in different places
    assert nested["block_size"] == tree["block_size"] == 5
    # z-lab's dflash
    assert nested["target_layer_ids"] == [0, 2, 4] and tree["num_target_layers"] == 6
    # SGLang
    assert tree["architectures"] == ["DFlashDraftModel"] and "auto_map" not in tree
    assert nested["shift_label"] is shift_label
    assert nested["pure_draft_prefix_len"] == 1
    assert tree["emb_dim"] == nested["emb_dim"]
    assert type(nested["mask_token_id"]) is int and nested["mask_token_id"] == 119
    assert tree["vocab_size"] == 120 and tree["dtype"] == "bfloat16"
    # sglang-jax reads the first, transformers 5 the second
    assert tree["rope_theta"] == tree["rope_parameters"]["rope_theta"] == 5000.0
    assert "partial_rotary_factor" not in tree | tree["rope_parameters"]
    # all
    assert tree["model_type"] == "qwen3" and tree["tie_word_embeddings"] is False
    assert tree["is_causal"] is False and nested["causal"] is False
    assert tree["layer_types"] == ["full_attention"] * 2
    for key in (*SIZES, "rms_norm_eps"):
        assert tree[key] == getattr(config, key), key


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("fields", [YARN | {"truncate": False}, LLAMA3], ids=["yarn", "llama3"])
def test_rope_scaling_is_written_in_both_schemas_and_reads_back(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    scaling = RopeScaling(**fields)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    save_hf_draft(tmp_path / "draft", config, params_of(CONFIG))
    assert load_hf_draft(tmp_path / "draft")[0].rope_scaling == scaling
    theirs = Qwen3Config.from_pretrained(tmp_path / "draft").rope_parameters
    assert theirs == {**fields, "rope_theta": 5000.0}


def test_config_json_of_a_shifted_dflash_draft_says_so_under_both_names(tmp_path: Path) -> None:
    save_hf_draft(tmp_path / "draft", SHIFTED_DFLASH, params_of(SHIFTED_DFLASH))
    tree = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert tree["dflash_config"]["shift_label"] is True
    # vLLM looks inside, speculators write it at the top.
    assert tree["sample_from_anchor"] is tree["dflash_config"]["sample_from_anchor"] is True
    assert load_hf_draft(tmp_path / "draft")[0] == SHIFTED_DFLASH


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedHead:
    """A head whose fields are of every plain type."""

    projector_type = "mixed"

    emb_dim: int = 12
    decay: float = 0.5
    gated: bool = True
    activation: str = "silu"


def test_fields_of_a_head_of_any_plain_type_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, "mixed", MixedHead)
    config = draft_config(head=MixedHead(decay=2.0, gated=False, activation="relu"))
    tree = json.loads(json.dumps(config_json(config, "float32")))
    assert config_from_json(tree, source="file") == config
    tree["dflash_config"]["decay"] = "slow"
    with pytest.raises(InputError, match="file: decay: expected float, found 'slow'"):
        config_from_json(tree, source="file")
    del tree["dflash_config"]["decay"]
    with pytest.raises(InputError, match="file: decay is missing"):
        config_from_json(tree, source="file")


# The whole file of a plain DFlash draft, and what a Domino head adds to its own section.
EXPORT: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "layer_types": ["full_attention", "full_attention"],
    "tie_word_embeddings": False,
    "num_target_layers": 6,
    "block_size": 5,
    "is_causal": False,
    "dtype": "float32",
    "dflash_config": {
        "mask_token_id": 119,
        "target_layer_ids": [0, 2, 4],
        "block_size": 5,
        "shift_label": False,
        "input_embedding_scale": 1.0,
        "output_multiplier": 1.0,
        "final_logit_softcapping": None,
        "causal": False,
    },
}


HEAD = {
    "shift_label": True,
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "emb_dim": 12,
    "gru_hidden_dim": 20,
}


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["domino", "dflash"])
def test_exports_are_written_key_by_key(config: DraftConfig) -> None:
    tree = copy.deepcopy(EXPORT)
    if config.projector_type is not None:
        tree["emb_dim"] = 12
        tree["dflash_config"] |= HEAD
    assert config_json(config, "float32") == tree
    assert config_from_json(tree, source="file") == config
