"""The draft checkpoint: what is saved, what NeMo makes of it, what save refuses."""

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
from safetensors.numpy import load_file

from domino_jax.base.errors import InputError
from domino_jax.config.model import DraftConfig
from domino_jax.interop.hf import hf_tensors, load_hf_draft, save_hf_draft


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_draft_that_is_not_finite_is_not_written(tmp_path: Path, dtype: str) -> None:
    params = params_of(CONFIG)
    params = params | {"fc": {"weight": params["fc"]["weight"].at[3, 5].set(jnp.nan)}}
    said = f"draft was not written: tensor fc.weight: 1 of 3072 entries are not finite in {dtype}; "
    with pytest.raises(InputError, match=f"^{tmp_path}/{said}"):
        save_hf_draft(tmp_path / "draft", CONFIG, params, dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_draft_that_overflows_in_the_stored_type_is_not_written(tmp_path: Path) -> None:
    params = params_of(CONFIG)
    params = params | {"fc": {"weight": params["fc"]["weight"].at[0].set(3.4e38)}}
    with pytest.raises(InputError, match=r"fc\.weight: 96 of 3072 entries .* in bfloat16"):
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
    ("name", "value", "message"),
    [
        ("norm", None, r"params: missing tensor: norm\.weight"),
        ("lm_head", np.zeros((2, 3)), r"unexpected tensor: lm_head\.weight"),
        ("fc", np.zeros((96, 32)), r"fc\.weight has shape \[96, 32\], expected \[32, 96\]"),
    ],
)
def test_hf_tensors_refuse_a_tree_that_does_not_fit(name: str, value: Any, message: str) -> None:
    params = params_of(CONFIG) | {name: {"weight": value}}
    if value is None:
        del params[name]
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
        rounded = torch.tensor(exact).bfloat16().float().numpy()
        np.testing.assert_array_equal(found[name], rounded, err_msg=name)


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
