"""The draft checkpoint: what is saved, what NeMo makes of it, what save refuses."""

import copy
import functools
import json
import os
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import files_end_at
from exports import BACKBONE, CONFIG, HEAD, KINDS, params_of
from reference import nemo_draft, random_anchors, random_batch
from safetensors.numpy import load_file

from domino_jax.base.errors import InputError
from domino_jax.config.model import DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.draft.mask import layer_spans
from domino_jax.interop.hf import hf_tensors, load_hf_draft, save_hf_draft


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


@pytest.mark.pitfall(
    "head not saved, random embedding exported, unknown keys skipped",
    seen="interop/hf.py: embed_proj left out; an embedding added",
)
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


def test_shards_have_an_index_and_load_back(tmp_path: Path) -> None:
    import torch
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    path, params = tmp_path / "draft", params_of(CONFIG)
    save_hf_draft(path, CONFIG, params, dtype="float32", shard_bytes=20_000)
    files = sorted(file.name for file in path.glob("*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and "model.safetensors" not in files
    assert (
        index["weight_map"].keys() == (BACKBONE | HEAD).keys()
        and sorted(set(index["weight_map"].values())) == files
    )
    chex.assert_trees_all_equal(load_hf_draft(path)[1], params, strict=True)
    theirs = Qwen3DFlashDraftModel.from_pretrained(path, dtype=torch.float32)
    np.testing.assert_array_equal(theirs.norm.weight.detach(), params["norm"]["weight"])


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


def test_a_failing_save_leaves_nothing_behind(tmp_path: Path) -> None:
    with files_end_at(20_000), pytest.raises(OSError, match="File too large"):
        save_hf_draft(tmp_path / "draft", CONFIG, params_of(CONFIG))
    assert not any(tmp_path.iterdir())
