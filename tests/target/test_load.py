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
    message = r"missing tensor|unexpected tensor|config\.json describes \d+ tensors, the"
    with pytest.raises(InputError, match=message):
        load_target(edited(llama, tmp_path, config={"num_hidden_layers": layers}))
    assert time.monotonic() - began < 10


def test_load_target_reads_shards(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, single = tiny("qwen3", tied=False)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    chex.assert_trees_all_equal(load_target(tmp_path).params, load_target(single).params)


def test_load_target_reads_bfloat16_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, single = tiny("llama", tied=True)

    def halved(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: values.astype(ml_dtypes.bfloat16) for name, values in arrays.items()}

    directory = edited(single, tmp_path, tensors=halved)
    wide, narrow = load_target(directory), load_target(directory, dtype="bfloat16")
    up_proj = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    expected = up_proj.bfloat16().float().numpy()
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


def without(part: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda arrays: {name: arrays[name] for name in arrays if part not in name}


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
    source = tiny(kind, tied=tied).directory
    directory = edited(source, tmp_path, tensors=spoilt(name, np.nan, -np.inf, 1.0))
    size = load_file(directory / "model.safetensors")[name].size
    message = (
        f"^{directory / 'model.safetensors'}: tensor {name}: 2 of {size} entries are not finite in "
        f"{dtype}; use an undamaged copy of the file$"
    )
    with pytest.raises(InputError, match=message):
        load_target(directory, dtype=dtype)
    # The count is that of the tensor, whatever part of it a device holds.
    model = Target(read_decoder_config(directory, dtype=dtype), scan_layers=True)
    with pytest.raises(InputError, match=message):
        load_sharded_target(directory, model, make_mesh(data=1, fsdp=8))


def test_numbers_that_overflow_the_compute_type_are_refused(llama: Path, tmp_path: Path) -> None:
    directory = edited(llama, tmp_path, tensors=spoilt(NORM, 3.4e38))
    norm = load_target(directory).params["layers_2"]["input_layernorm"]["weight"]
    assert norm[-1] == np.float32(3.4e38)
    with pytest.raises(InputError, match=f"{NORM}: 1 of 32 entries .* in bfloat16"):
        load_target(directory, dtype="bfloat16")


def test_a_copied_tied_head_with_nan_is_not_called_another_one(llama: Path, tmp_path: Path) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        spoilt("model.embed_tokens.weight", np.nan)(arrays)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    message = r"tensor model\.embed_tokens\.weight: 1 of \d+ entries are not finite"
    with pytest.raises(InputError, match=message):
        load_target(edited(llama, tmp_path, tensors=spoil))


EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
NINTH = EXPERT.replace("5", "8")
FIRST = "model.embed_tokens.weight, model.layers.0.input_layernorm.weight, "
REFUSED = [
    ("llama", without(NORM), f"missing tensor: {NORM}; expected 38, found 37"),
    ("llama", lambda a: a | {"model.layers.4.norm": a[NORM]}, "unexpected tensor: model.layers.4."),
    ("llama", lambda a: a | {NORM: a[NORM][:31]}, f"tensor {NORM} has shape [31], expected [32]"),
    ("llama", lambda a: a | {NORM: a[NORM].astype(np.int8)}, f"{NORM} is int8; supported: float32"),
    ("llama", head_that_differs, "lm_head.weight differs from model.embed_tokens.weight, but"),
    ("llama", lambda a: {"x": a[NORM]}, f"missing tensor: {FIRST}"),
    ("qwen3_moe", without(EXPERT), f"missing tensor: {EXPERT}; expected 134, found 133"),
    ("qwen3_moe", lambda a: a | {NINTH: a[EXPERT]}, f"unexpected tensor: {NINTH}; expected"),
    ("qwen3_moe", lambda a: a | {EXPERT: a[EXPERT].T}, "has shape [32, 24], expected [24, 32]"),
    ("qwen2", without("bias"), "missing tensor: model.layers.0.self_attn.k_proj.bias, "),
]


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda arrays: {change(name): values for name, values in arrays.items()}


TABLE = "model.embed_tokens.weight"
PREFIXES = [
    (
        lambda name: name.removeprefix("model."),
        f"lack the prefix 'model.': for example embed_tokens.weight in the place of {TABLE}",
    ),
    (
        lambda name: f"model.{name}",
        f"have the prefix 'model.', which was not expected: for example model.{TABLE} in the "
        f"place of {TABLE}",
    ),
    (
        lambda name: name.replace("model.", "transformer."),
        "begin with 'transformer.', expected 'model.': for example transformer.embed_tokens.weight",
    ),
    (
        lambda name: f"language_model.{name}",
        f"have the prefix 'language_model.', which was not expected: for example language_model."
        f"{TABLE}",
    ),
]


@pytest.mark.parametrize(("change", "message"), PREFIXES)
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_names_with_another_prefix_are_told_by_it(
    tiny: Callable[..., Any], tmp_path: Path, kind: str, change: Any, message: str
) -> None:
    directory = edited(tiny(kind, tied=True).directory, tmp_path, tensors=renamed(change))
    with pytest.raises(InputError) as caught:
        load_target(directory)
    assert str(caught.value).startswith(f"{directory}: tensor names {message}")
    assert str(caught.value).endswith("; rename the tensors")


def test_an_untied_head_may_keep_its_name(tiny: Callable[..., Any], tmp_path: Path) -> None:
    def change(name: str) -> str:
        return name if name == "lm_head.weight" else f"model.{name}"

    directory = edited(tiny("llama", tied=False).directory, tmp_path, tensors=renamed(change))
    with pytest.raises(InputError, match=r"tensor names have the prefix 'model\.', which was not"):
        load_target(directory)


@pytest.mark.parametrize(("kind", "change", "message"), REFUSED)
def test_load_target_refuses_tensors(
    tiny: Callable[..., Any], tmp_path: Path, kind: str, change: Any, message: str
) -> None:
    directory = edited(tiny(kind, tied=True).directory, tmp_path, tensors=change)
    with pytest.raises(InputError) as caught:
        load_target(directory)
    assert message in str(caught.value) and str(caught.value).startswith(str(directory))


def test_load_target_stacks_the_experts_in_their_order(tiny: Callable[..., Any]) -> None:
    directory = tiny("qwen3_moe", tied=False).directory
    arrays = load_file(directory / "model.safetensors")
    mlp = load_target(directory).params["layers_2"]["mlp"]
    assert set(mlp) == {"gate", "experts"}
    gate = arrays["model.layers.2.mlp.gate.weight"]
    np.testing.assert_array_equal(mlp["gate"]["weight"], gate)
    for name, leaf in mlp["experts"].items():
        stored = [arrays[f"model.layers.2.mlp.experts.{index}.{name}.weight"] for index in range(8)]
        np.testing.assert_array_equal(leaf, np.stack(stored))


def test_load_target_refuses_an_untied_model_without_its_head(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing tensor: lm_head.weight; expected 39, found 38"):
        load_target(edited(llama, tmp_path, config={"tie_word_embeddings": False}))
