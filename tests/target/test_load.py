"""Reading Hugging Face directories: every accepted form gives the same arrays, everything else one clear line."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from domino_jax.model_config import DecoderConfig
from domino_jax.strict import InputError
from domino_jax.target.load import load_target, load_tokenizer, read_decoder_config, read_json, read_safetensors

ABSENT = object()


def edited(source: Path, directory: Path, *, config: dict[str, Any] | None = None, tensors: Any = None) -> Path:
    """A copy of a directory with config keys changed (ABSENT removes one) and tensors passed through a function."""
    directory = directory / "model"
    shutil.copytree(source, directory)
    tree = json.loads((directory / "config.json").read_text()) | (config or {})
    tree = {key: value for key, value in tree.items() if value is not ABSENT}
    (directory / "config.json").write_text(json.dumps(tree))
    if tensors is not None:
        arrays = load_file(directory / "model.safetensors")
        save_file(tensors(arrays) or arrays, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Any]) -> Path:
    return tiny("llama", tied=True).directory


@pytest.fixture(scope="module")
def qwen3(tiny: Callable[..., Any]) -> Path:
    return tiny("qwen3", tied=False).directory


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_load_target_renames_and_changes_nothing(tiny: Callable[..., Any], kind: str, tied: bool) -> None:
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


def test_read_decoder_config_reads_every_field(qwen3: Path) -> None:
    assert read_decoder_config(qwen3, dtype="bfloat16") == DecoderConfig(
        vocab_size=352,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=5000.0,
        qk_norm=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("change", "field", "expected"),
    [
        ({"rope_theta": 77.0, "rope_parameters": ABSENT}, "rope_theta", 77.0),
        ({"rope_theta": 77, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}, "rope_theta", 77.0),
        (
            {"rope_parameters": {"rope_theta": 78.0, "type": "default", "partial_rotary_factor": 1.0}},
            "rope_theta",
            78.0,
        ),
        ({"rope_parameters": None, "rope_scaling": None}, "rope_theta", 10_000.0),
        ({"head_dim": ABSENT}, "head_dim", 8),
        ({"head_dim": None}, "head_dim", 8),
        ({"num_key_value_heads": ABSENT}, "num_key_value_heads", 4),
        ({"tie_word_embeddings": ABSENT}, "tie_word_embeddings", False),
        ({"attention_bias": ABSENT, "mlp_bias": None, "hidden_act": ABSENT}, "qk_norm", False),
    ],
)
def test_read_decoder_config_accepts_older_forms(
    llama: Path, tmp_path: Path, change: dict[str, Any], field: str, expected: object
) -> None:
    config = read_decoder_config(edited(llama, tmp_path, config=change), dtype="float32")
    assert getattr(config, field) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported: llama, qwen3"),
        ({"model_type": ABSENT}, "model_type is None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type is 'llama3'; supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters.rope_type is 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters.full_attention is {'rope"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a mapping"),
        ({"rope_theta": 4.0}, "rope_theta 4.0 and rope_parameters.rope_theta 5000.0 contradict"),
        ({"attention_bias": True}, "attention_bias is True; supported: False"),
        ({"mlp_bias": True}, "mlp_bias is True; supported: False"),
        ({"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types holds 'sliding_attention'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25; supported: 1"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_method': 'fp8'}"),
        ({"hidden_size": "32"}, "hidden_size: expected int, found '32'"),
        ({"hidden_size": ABSENT}, "missing hidden_size"),
        ({"vocab_size": ABSENT}, "missing vocab_size"),
        ({"rms_norm_eps": ABSENT}, "missing rms_norm_eps"),
        ({"head_dim": None, "num_attention_heads": 3}, "num_attention_heads 3 does not divide hidden_size 32"),
    ],
)
def test_read_decoder_config_refuses(llama: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_decoder_config(edited(llama, tmp_path, config=change), dtype="float32")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "model" / "config.json"))
    assert "\n" not in str(caught.value)


def test_read_decoder_config_refuses_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16, found 'float16'"):
        read_decoder_config(llama, dtype="float16")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file or directory"), ("{", "not valid JSON"), ("[]", "expected a JSON object, found list")],
)
def test_read_json_names_the_file(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=f"config.json: {message}"):
        read_json(tmp_path / "config.json")


def test_load_target_reads_shards(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, single = tiny("qwen3", tied=False)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    chex.assert_trees_all_equal(load_target(tmp_path).params, load_target(single).params)


def test_load_target_reads_bfloat16_files(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model, single = tiny("llama", tied=True)
    directory = edited(single, tmp_path, tensors=lambda a: {k: v.astype(ml_dtypes.bfloat16) for k, v in a.items()})
    wide, narrow = load_target(directory), load_target(directory, dtype="bfloat16")
    expected = model.state_dict()["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16).to(torch.float32).numpy()
    for loaded, dtype in ((wide, "float32"), (narrow, "bfloat16")):
        chex.assert_trees_all_equal_structs(loaded.params, wide.params)
        assert {leaf.dtype.name for leaf in flatten_dict(loaded.params).values()} == {dtype}
        found = loaded.params["layers_1"]["mlp"]["up_proj"]["weight"].astype("float32")
        np.testing.assert_array_equal(found, expected)


def test_load_target_ignores_rotary_buffers_and_a_copied_tied_head(llama: Path, tmp_path: Path) -> None:
    def add(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    loaded = load_target(edited(llama, tmp_path, tensors=add))
    chex.assert_trees_all_equal(loaded.params, load_target(llama).params)


NORM = "model.layers.2.input_layernorm.weight"


def head_that_differs(arrays: dict[str, np.ndarray]) -> None:
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {k: v for k, v in a.items() if k != NORM}, f"missing tensor: {NORM}; expected 38, found 37"),
        (lambda a: a | {"model.layers.4.mlp.up_proj.weight": a[NORM]}, "unexpected tensor: model.layers.4.mlp.up_proj"),
        (lambda a: a | {NORM: a[NORM][:31]}, f"tensor {NORM} has shape [31], expected [32]"),
        (lambda a: a | {NORM: a[NORM].astype(np.int8)}, f"tensor {NORM} is int8; supported: float32"),
        (head_that_differs, "lm_head.weight differs from model.embed_tokens.weight, but config.json says"),
        (
            lambda a: {"x": a[NORM]},
            "missing tensor: model.embed_tokens.weight, model.layers.0.input_layernorm.weight, ",
        ),
    ],
)
def test_load_target_refuses_tensors(llama: Path, tmp_path: Path, change: Any, message: str) -> None:
    directory = edited(llama, tmp_path, tensors=change)
    with pytest.raises(InputError) as caught:
        load_target(directory)
    assert message in str(caught.value) and str(caught.value).startswith(str(directory))


def test_load_target_refuses_an_untied_model_without_its_head(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing tensor: lm_head.weight; expected 39, found 38"):
        load_target(edited(llama, tmp_path, config={"tie_word_embeddings": False}))


def test_read_safetensors_never_opens_a_pickle(tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return opened.write_text, ("",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"found the pickle pytorch_model.bin, which is never opened"):
        read_safetensors(tmp_path)
    assert not opened.exists()


def test_read_safetensors_names_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected model.safetensors or model.safetensors.index.json; not there"):
        read_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file at all")
    with pytest.raises(InputError, match=r"model.safetensors: not a readable safetensors file"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, "two.safetensors: No such file"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "one.safetensors: holds other tensors than"),
        ({"a": "../one.safetensors"}, "weight_map names '../one.safetensors'; expected a file of the same directory"),
        ({"a": 3}, "expected weight_map, a mapping of tensors to files"),
        (None, "expected weight_map, a mapping of tensors to files"),
    ],
)
def test_read_safetensors_checks_the_index(tmp_path: Path, places: Any, message: str) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError) as caught:
        read_safetensors(tmp_path)
    assert message in str(caught.value)


def test_load_tokenizer_reads_a_fast_tokenizer(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.is_fast and "<|im_start|>" in tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json; a target needs its fast tokenizer"),
        ("tokenizer_config.json", None, "no tokenizer_config.json"),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}', "no chat template in"),
        ("tokenizer.json", '{"model": 3}', "the tokenizer cannot be read: "),
    ],
)
def test_load_tokenizer_refuses(smollm2: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    for kept in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / kept, tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
