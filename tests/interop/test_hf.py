"""The draft checkpoint: what a file holds, what NeMo makes of it, what load and save refuse."""

import copy
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    dflash_config,
    draft_config,
    nemo_draft,
    random_anchors,
    random_batch,
    random_params,
)
from safetensors.numpy import load_file, save_file
from transformers import Qwen3Config

from domino_jax.config.model import DraftConfig, RopeScaling
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.mask import layer_spans
from domino_jax.interop import hf
from domino_jax.interop.hf import hf_tensors, load_hf_draft, save_hf_draft
from domino_jax.strict import InputError

CONFIG = draft_config()
# D 32, C 3, F 44, 4 heads and 2 key-value heads of 10, G 20, R 12, V 120.
BACKBONE = {
    "fc.weight": (32, 96),
    "hidden_norm.weight": (32,),
    "norm.weight": (32,),
    **{
        f"layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (32,),
            "post_attention_layernorm": (32,),
            "self_attn.q_proj": (40, 32),
            "self_attn.k_proj": (20, 32),
            "self_attn.v_proj": (20, 32),
            "self_attn.o_proj": (32, 40),
            "self_attn.q_norm": (10,),
            "self_attn.k_norm": (10,),
            "mlp.gate_proj": (44, 32),
            "mlp.up_proj": (44, 32),
            "mlp.down_proj": (32, 44),
        }.items()
    },
}
HEAD = {
    "prefix_gru.weight_ih_l0": (60, 32),
    "prefix_gru.weight_hh_l0": (60, 20),
    "embed_proj.0.weight": (12, 52),
    "embed_proj.2.weight": (120, 12),
}
SLIDING = ("sliding_attention",) * 2
WINDOWED = draft_config(
    layer_types=SLIDING,
    sliding_window=6,
    input_embedding_scale=1.5,
    output_multiplier=0.5,
    final_logit_softcapping=20.0,
)
PLAIN = dflash_config()
SHIFTED_DFLASH = dataclasses.replace(PLAIN, shift_label=True)
KINDS = pytest.mark.parametrize(
    "config",
    [CONFIG, dflash_config(), SHIFTED_DFLASH, WINDOWED],
    ids=["domino", "dflash", "dflash-shifted", "windows-and-transforms"],
)


@functools.cache
def params_of(config: DraftConfig) -> Any:
    return random_params(config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float32 Domino draft without checksums, as other trainers leave it."""
    path = tmp_path_factory.mktemp("saved") / "draft"
    save_hf_draft(path, CONFIG, params_of(CONFIG), dtype="float32")
    (path / "SHA256SUMS").unlink()
    return path


@pytest.fixture
def draft(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return shutil.copytree(saved, tmp_path / "draft")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_draft_that_is_not_finite_is_not_written(tmp_path: Path, dtype: str) -> None:
    params = params_of(CONFIG)
    params = params | {"fc": {"weight": params["fc"]["weight"].at[3, 5].set(jnp.nan)}}
    with pytest.raises(InputError) as caught:
        save_hf_draft(tmp_path / "draft", CONFIG, params, dtype=dtype)
    said = (
        f"{tmp_path / 'draft'} was not written: "
        f"tensor fc.weight: 1 of 3072 entries are not finite in {dtype}; "
    )
    assert str(caught.value).startswith(said) and not list(tmp_path.iterdir())


def test_a_draft_that_overflows_in_the_stored_type_is_not_written(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    params = params | {"fc": {"weight": params["fc"]["weight"].at[0].set(3.4e38)}}
    with pytest.raises(
        InputError, match=r"fc\.weight: 96 of 3072 entries are not finite in bfloat16"
    ):
        save_hf_draft(tmp_path / "draft", CONFIG, params)
    save_hf_draft(tmp_path / "draft", CONFIG, params, dtype="float32")


def test_a_draft_that_is_not_finite_is_not_read(draft: Path) -> None:
    tensors = load_file(draft / "model.safetensors")
    tensors["norm.weight"][[1, 7]] = np.inf, np.nan
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(InputError) as caught:
        load_hf_draft(draft)
    assert str(caught.value).startswith(
        f"{draft}: tensor norm.weight: 2 of 32 entries are not finite in float32; "
    )


def edit_config(path: Path, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    tree = json.loads((path / "config.json").read_text())
    change(tree)
    (path / "config.json").write_text(json.dumps(tree))
    return tree


def edit_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@KINDS
def test_hf_tensors_names_every_tensor_of_the_format_and_no_other(config: DraftConfig) -> None:
    found = hf_tensors(config, params_of(config))
    head = HEAD if config.projector_type else {}
    assert {name: x.shape for name, x in found.items()} == BACKBONE | head
    assert all(type(x) is np.ndarray for x in found.values())


def test_hf_tensors_keep_the_type_of_the_tree() -> None:
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(CONFIG))
    assert {x.dtype for x in hf_tensors(CONFIG, halves).values()} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("norm",), None, r"params: missing tensor: norm\.weight"),
        (("layers_1", "mlp", "up_proj"), None, r"missing tensor: layers\.1\.mlp\.up_proj\.weight"),
        (("lm_head",), {"weight": np.zeros((2, 3))}, r"unexpected tensor: lm_head\.weight"),
        (
            ("fc", "weight"),
            np.zeros((96, 32)),
            r"fc\.weight has shape \[96, 32\], expected \[32, 96\]",
        ),
    ],
)
def test_hf_tensors_refuse_a_tree_that_does_not_fit(
    path: tuple[str, ...], value: Any, message: str
) -> None:
    params = copy.deepcopy(params_of(CONFIG))
    inner = functools.reduce(dict.__getitem__, path[:-1], params)
    inner.pop(path[-1], None)
    if value is not None:
        inner[path[-1]] = value
    with pytest.raises(InputError, match=message):
        hf_tensors(CONFIG, params)


@KINDS
def test_save_and_load_in_float32_give_the_same_bits(config: DraftConfig, tmp_path: Path) -> None:
    save_hf_draft(tmp_path / "draft", config, params_of(config), dtype="float32")
    found_config, found = load_hf_draft(tmp_path / "draft")
    assert (found_config.num_target_layers, found_config.target_layer_ids) == (6, (0, 2, 4))
    assert found_config == config
    chex.assert_trees_all_equal(found, params_of(config), strict=True)
    names = sorted(path.name for path in (tmp_path / "draft").iterdir())
    assert names == ["SHA256SUMS", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("changes", "is_causal"),
    [
        ({"layer_types": SLIDING, "sliding_window": 6}, False),
        ({"layer_types": SLIDING, "sliding_window": 6, "sliding_in_block": "causal"}, None),
        (
            {
                "layer_types": ("full_attention", SLIDING[0]),
                "sliding_window": 6,
                "sliding_in_block": "causal",
            },
            None,
        ),
        ({"layer_types": ("full_attention", SLIDING[0]), "sliding_window": 6}, False),
    ],
)
def test_windows_are_written_as_their_readers_take_them(
    changes: dict[str, Any], is_causal: bool | None, tmp_path: Path
) -> None:
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    config = draft_config(**changes)
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


@pytest.mark.parametrize(
    ("is_causal", "nested", "in_block"),
    [
        (..., ..., "causal"),
        (..., False, "bidirectional"),
        (False, ..., "bidirectional"),
        (True, False, "causal"),
    ],
)
def test_causality_is_read_as_vllm_reads_it(
    is_causal: Any, nested: Any, in_block: str, tmp_path: Path
) -> None:
    save_hf_draft(tmp_path / "draft", WINDOWED, params_of(WINDOWED))
    (tmp_path / "draft" / "SHA256SUMS").unlink()
    edit_config(tmp_path / "draft", put("is_causal", value=is_causal))
    edit_config(tmp_path / "draft", put("dflash_config", "causal", value=nested))
    assert load_hf_draft(tmp_path / "draft")[0].sliding_in_block == in_block


def test_a_sliding_layer_that_huggingface_would_read_as_full_is_refused(draft: Path) -> None:
    edit_config(draft, lambda tree: tree.update(layer_types=list(SLIDING), sliding_window=6))
    with pytest.raises(
        InputError, match="use_sliding_window is False and sliding_window 6; expected true"
    ):
        load_hf_draft(draft)


def test_save_rounds_to_bfloat16_by_default_like_torch(tmp_path: Path) -> None:
    import torch

    save_hf_draft(tmp_path / "draft", CONFIG, params_of(CONFIG))
    stored = load_file(tmp_path / "draft" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {jnp.dtype("bfloat16")}
    found = hf_tensors(CONFIG, load_hf_draft(tmp_path / "draft")[1])
    for name, exact in hf_tensors(CONFIG, params_of(CONFIG)).items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(
            found[name], torch.tensor(exact).bfloat16().float().numpy(), err_msg=name
        )


@KINDS
def test_nemo_reads_the_directory_and_computes_the_same_states(config: DraftConfig) -> None:
    import torch
    from nemo_automodel.components.attention.dflash_mask import create_dflash_sdpa_mask

    batch = random_batch(config)
    anchors, keep = random_anchors(config, batch, slots=11)
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((3, 11, config.block_size, config.hidden_size)).astype(np.float32)
    context = np.broadcast_to(np.arange(32, dtype=np.int32), (3, 32))
    positions = anchors[..., None] + np.arange(config.block_size, dtype=np.int32)
    found = jax.jit(DraftModel(config).apply)(
        {"params": params_of(config)},
        batch.hidden_states,
        context,
        noise,
        positions,
        layer_spans(config, anchors, keep),
    )
    slots = (torch.tensor(anchors), torch.tensor(keep))
    with torch.no_grad():
        expected = nemo_draft(config, params_of(config))(
            position_ids=torch.tensor(np.concatenate([context, positions.reshape(3, -1)], axis=1)),
            attention_mask=create_dflash_sdpa_mask(
                *slots,
                32,
                config.block_size,
                "cpu",
                torch.float32,
                sliding_window=config.sliding_window,
            ),
            noise_embedding=torch.tensor(noise.reshape(3, -1, config.hidden_size))
            * config.input_embedding_scale,
            target_hidden=torch.tensor(batch.hidden_states),
        )
    expected = expected.numpy().reshape(found.shape)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@KINDS
def test_nemo_takes_the_tensors_as_its_state_dict_and_its_own_export_loads_here(
    config: DraftConfig, tmp_path: Path
) -> None:
    import torch
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    save_hf_draft(tmp_path / "ours", config, params_of(config), dtype="float32")
    settings = Qwen3DFlashDraftModel.config_class.from_pretrained(tmp_path / "ours")
    theirs = Qwen3DFlashDraftModel(settings)
    tensors = hf_tensors(config, params_of(config))
    theirs.load_state_dict({name: torch.tensor(x) for name, x in tensors.items()}, strict=True)
    assert (theirs.block_size, theirs.mask_token_id, theirs.projector_type) == (
        5,
        119,
        config.projector_type,
    )
    theirs.save_pretrained(tmp_path / "theirs")
    found_config, found = load_hf_draft(tmp_path / "theirs")
    assert found_config == load_hf_draft(tmp_path / "ours")[0]
    chex.assert_trees_all_equal(found, params_of(config), strict=True)


@pytest.mark.parametrize("shift_label", [False, True])
def test_config_json_has_what_every_reader_insists_on(shift_label: bool, tmp_path: Path) -> None:
    config = draft_config(shift_label=shift_label)
    save_hf_draft(tmp_path / "draft", config, params_of(CONFIG))
    tree = json.loads((tmp_path / "draft" / "config.json").read_text())
    nested = tree["dflash_config"]
    # SpecForge
    assert (nested["projector_type"], nested["emb_dim"], nested["gru_hidden_dim"]) == (
        "domino",
        12,
        20,
    )
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
    assert (
        "partial_rotary_factor" not in tree
        and "partial_rotary_factor" not in tree["rope_parameters"]
    )
    # all
    assert tree["model_type"] == "qwen3" and tree["tie_word_embeddings"] is False
    assert tree["is_causal"] is False and nested["causal"] is False
    assert tree["layer_types"] == ["full_attention"] * 2
    qwen3 = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    for key in (*qwen3, "head_dim", "max_position_embeddings", "rms_norm_eps"):
        assert tree[key] == getattr(config, key), key


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=32, truncate=False
        ),
        RopeScaling(
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=32,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ],
)
def test_rope_scaling_is_written_in_both_schemas_and_reads_back(
    scaling: RopeScaling, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    save_hf_draft(tmp_path / "draft", config, params_of(CONFIG))
    assert load_hf_draft(tmp_path / "draft")[0].rope_scaling == scaling
    theirs = Qwen3Config.from_pretrained(tmp_path / "draft").rope_parameters
    assert theirs["rope_type"] == scaling.rope_type and theirs["rope_theta"] == 5000.0
    assert {
        key: theirs.get(key) for key in vars(scaling) if getattr(scaling, key) not in (None, True)
    } == {key: value for key, value in vars(scaling).items() if value not in (None, True)}


def test_config_json_of_a_dflash_draft_names_no_head(tmp_path: Path) -> None:
    save_hf_draft(tmp_path / "draft", dflash_config(), params_of(dflash_config()), dtype="float32")
    tree = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert tree["dtype"] == "float32" and tree["dflash_config"]["shift_label"] is False
    head = {"projector_type", "emb_dim", "gru_hidden_dim", "pure_draft_prefix_len"}
    assert not head & (set(tree) | set(tree["dflash_config"]))
    assert "sample_from_anchor" not in tree | tree["dflash_config"]


def test_config_json_of_a_shifted_dflash_draft_says_so_under_both_names(tmp_path: Path) -> None:
    save_hf_draft(tmp_path / "draft", SHIFTED_DFLASH, params_of(SHIFTED_DFLASH))
    tree = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert tree["dflash_config"]["shift_label"] is True
    # vLLM looks inside, speculators write it at the top.
    assert tree["sample_from_anchor"] is tree["dflash_config"]["sample_from_anchor"] is True
    assert load_hf_draft(tmp_path / "draft")[0] == SHIFTED_DFLASH


@pytest.mark.parametrize(
    ("nested", "top", "shifted"),
    [
        ({}, {}, False),
        ({"shift_label": True}, {}, True),
        ({"sample_from_anchor": True}, {}, True),
        ({}, {"sample_from_anchor": True}, True),
        ({"shift_label": False, "sample_from_anchor": False}, {}, False),
    ],
)
def test_a_dflash_draft_may_name_its_layout_either_way(
    nested: dict[str, bool], top: dict[str, bool], shifted: bool, tmp_path: Path
) -> None:
    save_hf_draft(tmp_path / "draft", PLAIN, params_of(PLAIN))
    (tmp_path / "draft" / "SHA256SUMS").unlink()

    def name_it(tree: dict[str, Any]) -> None:
        del tree["dflash_config"]["shift_label"]
        tree["dflash_config"] |= nested
        tree |= top

    edit_config(tmp_path / "draft", name_it)
    assert load_hf_draft(tmp_path / "draft")[0] == dataclasses.replace(PLAIN, shift_label=shifted)


# What this project wrote before plain DFlash could be shifted.
OLD_JSON: dict[str, Any] = {
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
OLD_HEAD_JSON = {
    "shift_label": True,
    "projector_type": "domino",
    "pure_draft_prefix_len": 1,
    "emb_dim": 12,
    "gru_hidden_dim": 20,
}


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["domino", "dflash"])
def test_old_exports_load_as_before_and_are_written_as_before(
    config: DraftConfig, tmp_path: Path
) -> None:
    tree = copy.deepcopy(OLD_JSON)
    if config.projector_type is not None:
        tree["emb_dim"] = 12
        tree["dflash_config"] |= OLD_HEAD_JSON
    save_hf_draft(tmp_path / "draft", config, params_of(config), dtype="float32")
    assert json.loads((tmp_path / "draft" / "config.json").read_text()) == tree
    (tmp_path / "draft" / "config.json").write_text(json.dumps(tree))
    (tmp_path / "draft" / "SHA256SUMS").unlink()
    found_config, found = load_hf_draft(tmp_path / "draft")
    assert found_config == config
    chex.assert_trees_all_equal(found, params_of(config), strict=True)


def test_shards_have_an_index_and_load_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    split = functools.partial(hf.split_state_dict_into_shards_factory, max_shard_size="20KB")
    monkeypatch.setattr(hf, "split_state_dict_into_shards_factory", split)
    save_hf_draft(tmp_path / "draft", CONFIG, params_of(CONFIG), dtype="float32")
    files = sorted(path.name for path in (tmp_path / "draft").glob("*.safetensors"))
    index = json.loads((tmp_path / "draft" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and "model.safetensors" not in files
    assert (
        index["weight_map"].keys() == (BACKBONE | HEAD).keys()
        and sorted(set(index["weight_map"].values())) == files
    )
    chex.assert_trees_all_equal(
        load_hf_draft(tmp_path / "draft")[1], params_of(CONFIG), strict=True
    )
    theirs = Qwen3DFlashDraftModel.from_pretrained(tmp_path / "draft", dtype=torch.float32)
    np.testing.assert_array_equal(theirs.norm.weight.detach(), params_of(CONFIG)["norm"]["weight"])


def test_load_refuses_an_export_that_is_not_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "draft"
    save_hf_draft(path, CONFIG, params_of(CONFIG))
    (path / "README.md").write_text("A model card came later.")
    load_hf_draft(path)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(
        InputError, match=r"draft: damaged: model.safetensors does not match its checksum"
    ):
        load_hf_draft(path)
    weights.unlink()
    with pytest.raises(InputError, match=r"draft: damaged: model.safetensors is missing"):
        load_hf_draft(path)


def test_save_writes_into_an_empty_directory_and_refuses_a_used_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "draft"
    path.mkdir(parents=True)
    save_hf_draft(path, CONFIG, params_of(CONFIG))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(InputError, match=r"draft: already there"):
        save_hf_draft(path, CONFIG, params_of(CONFIG), dtype="float32")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match=r"file: already there"):
        save_hf_draft(tmp_path / "file", CONFIG, params_of(CONFIG))
    assert (tmp_path / "file").read_text() == "mine"


def test_save_refuses_another_dtype(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bfloat16 or float32, found 'float16'"):
        save_hf_draft(tmp_path / "draft", CONFIG, params_of(CONFIG), dtype="float16")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_what_is_saved_has_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Weights of mode 600 could be served by nobody but their owner."""
    before = os.umask(umask)
    try:
        save_hf_draft(tmp_path / "draft", CONFIG, params_of(CONFIG))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "draft").iterdir()} == {mode}
    assert (tmp_path / "draft").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failing_save_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, tensors: dict[str, np.ndarray]) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(hf, "write_safetensors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_hf_draft(tmp_path / "draft", CONFIG, params_of(CONFIG))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("embed_proj.2.weight"),
            r"draft: missing tensor: embed_proj\.2\.weight; expected 29, found 28",
        ),
        (
            lambda t: t.update({"lm_head.weight": np.zeros((120, 32), np.float32)}),
            r"unexpected tensor: lm_head\.weight",
        ),
        (
            lambda t: t.update({"prefix_gru.weight_hh_l0": np.zeros((20, 60), np.float32)}),
            r"prefix_gru\.weight_hh_l0 has shape \[20, 60\], expected \[60, 20\]",
        ),
        (
            lambda t: [t.pop(name) for name in HEAD | {"fc.weight": 0, "norm.weight": 0}],
            r"missing tensor: .* and 3 more",
        ),
    ],
    ids=["missing", "unknown", "mis-shaped", "many"],
)
def test_load_refuses_other_tensors(
    draft: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_tensors(draft, change)
    with pytest.raises(InputError, match=message):
        load_hf_draft(draft)


def use_old_names(tensors: dict[str, np.ndarray]) -> None:
    for name in HEAD:
        tensors[f"logit_head.{name}"] = tensors.pop(name)


def test_load_accepts_the_names_of_the_first_domino_checkpoints(draft: Path) -> None:
    edit_tensors(draft, use_old_names)
    assert not HEAD.keys() & load_file(draft / "model.safetensors").keys()
    config, found = load_hf_draft(draft)
    assert config == CONFIG
    chex.assert_trees_all_equal(found, params_of(CONFIG), strict=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update(
                {"logit_head.prefix_gru.weight_hh_l0": t["prefix_gru.weight_hh_l0"]}
            ),
            r"draft: tensor prefix_gru\.weight_hh_l0 is there twice, "
            r"as logit_head\.prefix_gru\.weight_hh_l0 and as",
        ),
        (
            lambda t: (use_old_names(t), t.pop("logit_head.embed_proj.0.weight")),
            r"missing tensor: embed_proj\.0\.weight",
        ),
        (
            lambda t: t.update(
                {"logit_head.norm.weight": t.pop("norm.weight")}
            ),  # only the head was ever below it
            r"missing tensor: norm\.weight",
        ),
    ],
    ids=["both", "missing", "backbone"],
)
def test_load_refuses_old_names_that_do_not_add_up(
    draft: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    edit_tensors(draft, change)
    with pytest.raises(InputError, match=message):
        load_hf_draft(draft)


def put(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of config.json: sets the key at the end of the path, or removes it for `...`."""

    def change(tree: dict[str, Any]) -> None:
        section = functools.reduce(dict.__getitem__, keys[:-1], tree)
        section.pop(keys[-1], None)
        if value is not ...:
            section[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("dflash_config", "shift_label"), ..., "shift_label is missing"),
        (("dflash_config", "shift_label"), "true", "shift_label is 'true'"),
        (("dflash_config", "shift_label"), 1, "shift_label is 1"),
        (
            ("dflash_config", "sample_from_anchor"),
            1,
            "sample_from_anchor is 1, expected true or false",
        ),
        (
            ("dflash_config", "sample_from_anchor"),
            False,
            r"dflash_config\.shift_label is true, "
            r"dflash_config\.sample_from_anchor is false: names of one layout",
        ),
        (
            ("sample_from_anchor",),
            False,
            "shift_label is true, sample_from_anchor is false: names of one layout",
        ),
        (("block_size",), 16, r"block_size contradicts itself: \[5, 16\]"),
        (("emb_dim",), 13, r"emb_dim contradicts itself: \[12, 13\]"),
        (("rope_theta",), 1e6, r"rope_theta contradicts itself: \[1000000\.0, 5000\.0\]"),
        (
            ("dflash_config", "mask_token_id"),
            120,
            "mask_token_id 120 is outside the vocabulary of 120",
        ),
        (("dflash_config", "mask_token_id"), -1, "mask_token_id -1 is outside the vocabulary"),
        (("dflash_config", "mask_token_id"), ..., "mask_token_id is missing"),
        (("dflash_config", "mask_token_id"), True, "mask_token_id is True"),
        (("dflash_config", "gru_hidden_dim"), ..., "gru_hidden_dim is missing"),
        (
            ("dflash_config", "projector_type"),
            "eagle",
            "projector_type must be 'domino' or null, found 'eagle'",
        ),
        (("dflash_config", "target_layer_ids"), ..., "target_layer_ids is missing"),
        (("dflash_config", "target_layer_ids"), [0, 2, 6], r"target_layer_ids \[0, 2, 6\]"),
        (("dflash_config", "target_layer_ids"), [0, 2, "4"], r"target_layer_ids is \[0, 2, '4'\]"),
        (("dflash_config", "causal"), True, "causal is True; only False"),
        (
            ("dflash_config", "final_logit_softcapping"),
            -1.0,
            "final_logit_softcapping must be positive",
        ),
        (("dflash_config", "output_multiplier"), "2", "output_multiplier is '2'"),
        (
            ("layer_types",),
            ["full_attention", "linear_attention"],
            r"layer_types holds \['linear_attention'\]",
        ),
        (("layer_types",), "full_attention", "layer_types is 'full_attention'; expected a list"),
        (
            ("layer_types",),
            ["full_attention"],
            "layer_types names 1 layers, num_hidden_layers is 2",
        ),
        (("is_causal",), True, "is_causal is true; a block without windows looks both ways"),
        (("dflash_config",), ..., "no dflash_config section; is this a DFlash or Domino draft"),
        (("hidden_size",), ..., "hidden_size is missing"),
        (("hidden_size",), 32.0, r"hidden_size is 32\.0"),
        (("attention_bias",), True, "attention_bias is True; only False"),
        (("partial_rotary_factor",), 0.25, "partial_rotary_factor is 0.25"),
        (("rope_parameters", "partial_rotary_factor"), 0.25, "partial_rotary_factor is 0.25"),
        (("rope_parameters", "rope_type"), "yarn", "rope_scaling: missing factor"),
        (("rope_parameters", "rope_type"), "dynamic", "rope_type is 'dynamic'"),
        (("rope_parameters",), "default", "rope_parameters is 'default'"),
        (("rope_scaling",), {"type": "linear", "factor": 2.0}, "rope_scaling"),
        (("layer_types",), ["full_attention", "sliding_attention"], "layer_types"),
        (("layer_types",), 5, "layer_types is 5; expected a list"),
        (("num_hidden_layers",), "2", "num_hidden_layers is '2'"),
        (("num_hidden_layers",), None, "num_hidden_layers is missing"),
        (("num_hidden_layers",), 2**62, "num_hidden_layers must be at most 10000"),
        (("hidden_size",), 2**63, "hidden_size must be at most 16777216"),
        (("num_target_layers",), 2**62, "num_target_layers must be at most"),
        (("rms_norm_eps",), 0, "rms_norm_eps must lie between 0 and 1"),
        (("rms_norm_eps",), -1e-6, "rms_norm_eps must lie between 0 and 1"),
        (("rms_norm_eps",), float("nan"), "NaN is not a number of JSON"),
        (
            ("dflash_config", "input_embedding_scale"),
            float("inf"),
            "Infinity is not a number of JSON",
        ),
        (
            ("dflash_config", "input_embedding_scale"),
            1e300,
            "input_embedding_scale must be finite in float32",
        ),
        (("dflash_config", "mask_token_id"), "\0" * 10**5, "mask_token_id is '"),
    ],
)
def test_load_refuses_other_configs(
    draft: Path, keys: tuple[str, ...], value: Any, message: str
) -> None:
    edit_config(draft, put(*keys, value=value))
    with pytest.raises(InputError, match=rf"config\.json: .*{message}"):
        load_hf_draft(draft)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("block_size",), ...),  # as the authors publish it
        (("dflash_config", "block_size"), ...),  # as older NeMo recipes wrote it
        (("emb_dim",), ...),
        (("rope_theta",), ...),
        (("rope_parameters",), ...),
        (("rope_parameters", "partial_rotary_factor"), 1.0),
        (("layer_types",), ...),
        (("architectures",), ["Qwen3DFlashDraftModel"]),
        (("dflash_config", "causal"), ...),
    ],
)
def test_load_accepts_what_other_writers_leave_out(
    draft: Path, keys: tuple[str, ...], value: Any
) -> None:
    edit_config(draft, put(*keys, value=value))
    assert load_hf_draft(draft)[0] == CONFIG


@pytest.mark.parametrize("layers", [1, 3, 9999])
def test_load_refuses_another_depth_before_it_builds_a_model(
    draft: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("domino_jax.interop.hf._parameter_shapes", built)
    edit_config(draft, put("num_hidden_layers", value=layers))
    edit_config(draft, put("layer_types", value=...))
    with pytest.raises(
        InputError, match=f"tensors of 2 layers, config.json says num_hidden_layers {layers}"
    ):
        load_hf_draft(draft)


def test_load_takes_a_missing_pure_prefix_as_none(draft: Path) -> None:
    edit_config(draft, put("dflash_config", "pure_draft_prefix_len", value=...))
    assert load_hf_draft(draft)[0].pure_draft_prefix_len == 0  # NeMo's default too


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"config\.json: No such file"),
        ({"config.json": "{"}, r"config\.json: not valid JSON"),
        ({"config.json": "[1]"}, r"config\.json: expected a JSON object, found list"),
        ({"config.json": '{"model_type": "qwen3"}'}, r"config\.json: no dflash_config section"),
    ],
    ids=["empty", "broken", "list", "target"],
)
def test_load_refuses_what_is_not_a_draft_directory(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_hf_draft(tmp_path)


def test_load_refuses_a_directory_without_weights(draft: Path) -> None:
    (draft / "model.safetensors").rename(draft / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load_hf_draft(draft)
