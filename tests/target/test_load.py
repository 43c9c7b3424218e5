"""Tensors of Hugging Face directories: accepted forms are equal, all else is one clear line."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import ml_dtypes
import numpy as np
import pytest
from copies import edited
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from domino_jax.base.errors import InputError
from domino_jax.sharding import make_mesh
from domino_jax.target import load
from domino_jax.target.decoder import Target
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.load import load_sharded_target, load_target


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_load_target_renames_and_changes_nothing(
    tiny: Callable[..., Any], kind: str, tied: bool
) -> None:
    model, directory = tiny(kind, tied=tied)
    loaded = load_target(directory)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if tied:
        del state["lm_head.weight"]
    assert loaded.path == directory
    assert len(flatten_dict(loaded.params)) == len(state)
    params = loaded.params
    np.testing.assert_array_equal(params["embed_tokens"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["norm"]["weight"], state["model.norm.weight"])
    assert ("lm_head" in params) != tied
    for path, leaf in flatten_dict(params).items():
        if path[0].startswith("layers_"):
            name = ".".join(("model.layers", path[0].removeprefix("layers_"), *path[1:]))
            np.testing.assert_array_equal(leaf, state[name])


@pytest.mark.parametrize("layers", [1, 3, 500, 9999])
def test_a_target_of_another_depth_is_refused_before_it_is_built(
    llama: Path, tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def walked(*_: object) -> None:
        raise AssertionError("layers were built")

    monkeypatch.setattr(load, "expected_tensors", walked)
    began = time.monotonic()
    with pytest.raises(
        InputError,
        match=r"missing tensor|unexpected tensor|config\.json describes \d+ tensors, the",
    ):
        load_target(edited(llama, tmp_path, config={"num_hidden_layers": layers}))
    assert time.monotonic() - began < 10


def test_load_target_reads_shards(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, single = tiny("qwen3", tied=False)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert (
        len(list(tmp_path.glob("*.safetensors"))) > 2
        and not (tmp_path / "model.safetensors").exists()
    )
    chex.assert_trees_all_equal(load_target(tmp_path).params, load_target(single).params)


def test_load_target_reads_bfloat16_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    model, single = tiny("llama", tied=True)
    directory = edited(
        single, tmp_path, tensors=lambda a: {k: v.astype(ml_dtypes.bfloat16) for k, v in a.items()}
    )
    wide, narrow = load_target(directory), load_target(directory, dtype="bfloat16")
    expected = (
        model.state_dict()["model.layers.1.mlp.up_proj.weight"]
        .to(torch.bfloat16)
        .to(torch.float32)
        .numpy()
    )
    for loaded, dtype in ((wide, "float32"), (narrow, "bfloat16")):
        chex.assert_trees_all_equal_structs(loaded.params, wide.params)
        assert {leaf.dtype.name for leaf in flatten_dict(loaded.params).values()} == {dtype}
        found = loaded.params["layers_1"]["mlp"]["up_proj"]["weight"].astype("float32")
        np.testing.assert_array_equal(found, expected)


def test_load_target_ignores_rotary_buffers_and_a_copied_tied_head(
    llama: Path, tmp_path: Path
) -> None:
    def add(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    loaded = load_target(edited(llama, tmp_path, tensors=add))
    chex.assert_trees_all_equal(loaded.params, load_target(llama).params)


NORM = "model.layers.2.input_layernorm.weight"


def head_that_differs(arrays: dict[str, np.ndarray]) -> None:
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1


def spoilt(name: str, *values: float) -> Callable[[dict[str, np.ndarray]], None]:
    """A change of tensors that puts values at the end of one."""

    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name].flat[-len(values) :] = values

    return spoil


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("qwen3_moe", False)])
def test_targets_with_numbers_that_are_not_finite_are_refused(
    tiny: Callable[..., Any], tmp_path: Path, kind: str, tied: bool, dtype: str
) -> None:
    experts = "model.layers.1.mlp.experts.5.down_proj.weight"
    name = experts if kind == "qwen3_moe" else "model.layers.3.mlp.up_proj.weight"
    directory = edited(
        tiny(kind, tied=tied).directory, tmp_path, tensors=spoilt(name, np.nan, -np.inf, 1.0)
    )
    size = load_file(directory / "model.safetensors")[name].size
    message = (
        f"{directory / 'model.safetensors'}: tensor {name}: "
        f"2 of {size} entries are not finite in {dtype}; "
    )
    with pytest.raises(InputError) as caught:
        load_target(directory, dtype=dtype)
    assert str(caught.value) == f"{message}use an undamaged copy of the file"
    # The count is that of the tensor, whatever part of it a device holds.
    model = Target(read_decoder_config(directory, dtype=dtype), scan_layers=True)
    with pytest.raises(InputError) as caught:
        load_sharded_target(directory, model, make_mesh(data=1, fsdp=8))
    assert str(caught.value).startswith(message)


def test_numbers_that_overflow_the_compute_type_are_refused(llama: Path, tmp_path: Path) -> None:
    directory = edited(llama, tmp_path, tensors=spoilt(NORM, 3.4e38))
    assert float(
        load_target(directory).params["layers_2"]["input_layernorm"]["weight"][-1]
    ) == np.float32(3.4e38)
    with pytest.raises(
        InputError, match=r"layers\.2\.input_layernorm\.weight: 1 of 32 entries .* in bfloat16"
    ):
        load_target(directory, dtype="bfloat16")


def test_a_copied_tied_head_with_nan_is_not_called_another_one(llama: Path, tmp_path: Path) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        spoilt("model.embed_tokens.weight", np.nan)(arrays)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    with pytest.raises(
        InputError, match=r"tensor model\.embed_tokens\.weight: 1 of \d+ entries are not finite"
    ):
        load_target(edited(llama, tmp_path, tensors=spoil))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {k: v for k, v in a.items() if k != NORM},
            f"missing tensor: {NORM}; expected 38, found 37",
        ),
        (
            lambda a: a | {"model.layers.4.mlp.up_proj.weight": a[NORM]},
            "unexpected tensor: model.layers.4.mlp.up_proj",
        ),
        (lambda a: a | {NORM: a[NORM][:31]}, f"tensor {NORM} has shape [31], expected [32]"),
        (
            lambda a: a | {NORM: a[NORM].astype(np.int8)},
            f"tensor {NORM} is int8; supported: float32",
        ),
        (
            head_that_differs,
            "lm_head.weight differs from model.embed_tokens.weight, but config.json says",
        ),
        (
            lambda a: {"x": a[NORM]},
            "missing tensor: model.embed_tokens.weight, model.layers.0.input_layernorm.weight, ",
        ),
    ],
)
def test_load_target_refuses_tensors(
    llama: Path, tmp_path: Path, change: Any, message: str
) -> None:
    directory = edited(llama, tmp_path, tensors=change)
    with pytest.raises(InputError) as caught:
        load_target(directory)
    assert message in str(caught.value) and str(caught.value).startswith(str(directory))


EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {k: v for k, v in a.items() if k != EXPERT},
            f"missing tensor: {EXPERT}; expected 135, found 134",
        ),
        (
            lambda a: a | {EXPERT.replace("5", "8"): a[EXPERT]},
            f"unexpected tensor: {EXPERT.replace('5', '8')}; expected",
        ),
        (
            lambda a: a | {EXPERT: a[EXPERT].T},
            f"tensor {EXPERT} has shape [32, 24], expected [24, 32]",
        ),
    ],
)
def test_load_target_refuses_experts(
    tiny: Callable[..., Any], tmp_path: Path, change: Any, message: str
) -> None:
    directory = edited(tiny("qwen3_moe", tied=False).directory, tmp_path, tensors=change)
    with pytest.raises(InputError) as caught:
        load_target(directory)
    assert message in str(caught.value) and str(caught.value).startswith(str(directory))


def test_load_target_stacks_the_experts_in_their_order(tiny: Callable[..., Any]) -> None:
    directory = tiny("qwen3_moe", tied=False).directory
    arrays, experts = (
        load_file(directory / "model.safetensors"),
        load_target(directory).params["layers_2"]["mlp"],
    )
    assert set(experts) == {"gate", "experts"}
    np.testing.assert_array_equal(
        experts["gate"]["weight"], arrays["model.layers.2.mlp.gate.weight"]
    )
    for name, leaf in experts["experts"].items():
        stored = [arrays[f"model.layers.2.mlp.experts.{index}.{name}.weight"] for index in range(8)]
        np.testing.assert_array_equal(leaf, np.stack(stored))


def test_load_target_refuses_qwen2_without_its_biases(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    directory = edited(
        tiny("qwen2", tied=True).directory,
        tmp_path,
        tensors=lambda a: {k: v for k, v in a.items() if "bias" not in k},
    )
    with pytest.raises(
        InputError, match=r"missing tensor: model.layers.0.self_attn.k_proj.bias, .* and 9 more"
    ):
        load_target(directory)


def test_load_target_refuses_an_untied_model_without_its_head(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing tensor: lm_head.weight; expected 39, found 38"):
        load_target(edited(llama, tmp_path, config={"tie_word_embeddings": False}))
