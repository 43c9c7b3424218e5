"""Reading Hugging Face directories: accepted forms give equal arrays, all else one clear line."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from domino_jax.config.model import DecoderConfig, RopeScaling
from domino_jax.formats.safetensors import open_safetensors
from domino_jax.sharding import make_mesh
from domino_jax.strict import InputError
from domino_jax.target import load
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.load import load_sharded_target, load_target, load_tokenizer
from domino_jax.target.model import Target

ABSENT = object()
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN_IN_OLD_FILES = {"factor": 4.0, "original_max_position_embeddings": 32}
SHORT = (
    "rope_scaling",
    RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
)
WHOLE = (
    "rope_scaling",
    RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
)
MIXTURE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def edited(
    source: Path, directory: Path, *, config: dict[str, Any] | None = None, tensors: Any = None
) -> Path:
    """A copy of a directory with changed config keys and tensors.

    ABSENT removes a key; the tensors pass through a function.
    """
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
        (
            {"rope_theta": 77, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
            "rope_theta",
            77.0,
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 78.0,
                    "type": "default",
                    "partial_rotary_factor": 1.0,
                }
            },
            "rope_theta",
            78.0,
        ),
        ({"rope_parameters": None, "rope_scaling": None}, "rope_theta", 10_000.0),
        ({"head_dim": ABSENT}, "head_dim", 8),
        ({"head_dim": None}, "head_dim", 8),
        ({"num_key_value_heads": ABSENT}, "num_key_value_heads", 4),
        ({"tie_word_embeddings": ABSENT}, "tie_word_embeddings", False),
        ({"attention_bias": ABSENT, "mlp_bias": None, "hidden_act": ABSENT}, "qk_norm", False),
        ({"model_type": "qwen2", "attention_bias": ABSENT}, "attention_bias", True),
        (MIXTURE, "num_experts", 8),
        (MIXTURE | {"num_experts": ABSENT, "num_local_experts": 8}, "num_experts", 8),
        (MIXTURE | {"norm_topk_prob": ABSENT}, "norm_topk_prob", False),
        (
            {
                "rope_parameters": {
                    k: v for k, v in YARN.items() if k != "original_max_position_embeddings"
                }
            },
            *WHOLE,
        ),
        (
            {"rope_parameters": YARN, "rope_scaling": {"rope_type": "yarn", **YARN_IN_OLD_FILES}},
            *SHORT,
        ),
        (
            {
                "rope_parameters": {"rope_theta": 5e3},
                "rope_scaling": {"type": "yarn", **YARN_IN_OLD_FILES},
            },
            *SHORT,
        ),
        ({"rope_parameters": YARN | {"attention_factor": None, "beta_fast": None}}, *SHORT),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {"type": "yarn", "factor": 4},
            },
            *SHORT,
        ),
        (
            {"rope_parameters": ABSENT, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling",
            RopeScaling(rope_type="linear", factor=2.0),
        ),
        ({"rope_scaling": {"type": "default"}}, "rope_scaling", None),
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
        (
            {"model_type": "mistral"},
            "model_type is 'mistral'; supported: llama, qwen2, qwen3, qwen3_moe",
        ),
        ({"model_type": ABSENT}, "model_type is None"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
            "rope_scaling.rope_type is 'dynamic'; supported: d",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling {'rope_type': 'linear', 'factor': 8.0} and",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn"}},
            "rope_type 'yarn' and type 'linear' contradict",
        ),
        (
            {"rope_scaling": {"factor": 8.0}},
            "rope_scaling.factor is 8.0; not supported with rope_type None",
        ),
        (
            {"original_max_position_embeddings": 64, "rope_parameters": LLAMA3},
            "original_max_position_embeddings 64 "
            "and rope_parameters.original_max_position_embeddings 32 contradict",
        ),
        ({"rope_parameters": LLAMA3 | {"factor": None}}, "rope_scaling: missing factor"),
        (
            {"rope_parameters": LLAMA3 | {"factor": "big"}},
            "rope_scaling: factor: expected float, found 'big'",
        ),
        (
            {"rope_parameters": LLAMA3 | {"factr": 8.0}},
            "rope_scaling: unknown key 'factr'; did you mean 'factor'?",
        ),
        (
            {"rope_parameters": LLAMA3 | {"low_freq_factor": None}},
            "rope_scaling: rope_type 'llama3' needs low_freq_f",
        ),
        (
            {"rope_parameters": LLAMA3 | {"beta_fast": 32}},
            "rope_scaling: rope_type 'llama3' does not read beta_fast",
        ),
        (
            {"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}},
            "low_freq_factor 1.0 must be below high_freq_factor",
        ),
        (
            {"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5; not supported",
        ),
        (
            {"rope_parameters": YARN | {"mscale": 1.0}},
            "rope_scaling: mscale and mscale_all_dim go together",
        ),
        (
            {"rope_parameters": YARN | {"factor": 0.5}},
            "rope_scaling: factor must be at least 1, found 0.5",
        ),
        (
            {"rope_parameters": YARN | {"beta_slow": -1}},
            "rope_scaling: beta_slow must be positive, found -1.0",
        ),
        (
            {"rope_parameters": YARN | {"beta_slow": 40}},
            "beta_fast 32.0 must not be below beta_slow 40.0",
        ),
        (
            {"rope_parameters": YARN | {"truncate": None}},
            "rope_scaling: truncate: expected bool, found None",
        ),
        ({"rope_parameters": None, "rope_theta": 1.0}, "rope_theta must be above 1, found 1.0"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters.full_attention is {'rope",
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a mapping"),
        ({"rope_theta": 4.0}, "rope_theta 4.0 and rope_parameters.rope_theta 5000.0 contradict"),
        ({"attention_bias": True}, "attention_bias is True; supported: False"),
        (
            {"model_type": "qwen3", "attention_bias": True},
            "attention_bias is True; supported: False",
        ),
        (
            {"model_type": "qwen2", "attention_bias": False},
            "attention_bias is False; supported: True",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True},
            "use_sliding_window is True; supported: False",
        ),
        (MIXTURE | {"mlp_only_layers": [1]}, "mlp_only_layers is [1]; supported: []"),
        (MIXTURE | {"decoder_sparse_step": 2}, "decoder_sparse_step is 2; supported: 1"),
        (MIXTURE | {"num_experts": 0}, "num_experts is 0; expected a mixture"),
        (MIXTURE | {"num_experts": ABSENT}, "missing num_experts"),
        (MIXTURE | {"num_local_experts": 4}, "num_experts 8 and num_local_experts 4 contradict"),
        (MIXTURE | {"num_experts_per_tok": ABSENT}, "missing num_experts_per_tok"),
        (
            MIXTURE | {"num_experts_per_tok": 9},
            "num_experts_per_tok 9 must not exceed num_experts 8",
        ),
        (MIXTURE | {"moe_intermediate_size": 0}, "moe_intermediate_size must be positive, found 0"),
        (MIXTURE | {"norm_topk_prob": "yes"}, "norm_topk_prob: expected bool, found 'yes'"),
        ({"mlp_bias": True}, "mlp_bias is True; supported: False"),
        ({"use_sliding_window": True}, "use_sliding_window is True; supported: False"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types holds 'sliding_attention'",
        ),
        ({"layer_types": 5}, "layer_types is 5; expected one name for each layer"),
        ({"layer_types": [{}]}, "layer_types holds {}; supported: 'full_attention'"),
        ({"layer_types": ["full_attention"] * 9}, "expected one name for each layer"),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected int, found None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: expected int, found '2'"),
        ({"num_hidden_layers": 100_000}, "num_hidden_layers must be at most 10000, found 100000"),
        ({"hidden_size": 2**63}, "hidden_size must be at most 16777216"),
        ({"vocab_size": -1}, "vocab_size must be positive, found -1"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must lie between 0 and 1, found 0.0"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must lie between 0 and 1, found -1e-06"),
        ({"rms_norm_eps": float("nan")}, "not valid JSON: NaN is not a number of JSON"),
        ({"rms_norm_eps": float("inf")}, "not valid JSON: Infinity is not a number of JSON"),
        ({"rope_theta": 1e300, "rope_parameters": None}, "is not a number that float32 holds"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25; supported: 1"),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config is {'quant_method': 'fp8'}",
        ),
        ({"hidden_size": "32"}, "hidden_size: expected int, found '32'"),
        ({"hidden_size": ABSENT}, "missing hidden_size"),
        ({"vocab_size": ABSENT}, "missing vocab_size"),
        ({"rms_norm_eps": ABSENT}, "missing rms_norm_eps"),
        (
            {"head_dim": None, "num_attention_heads": 3},
            "num_attention_heads 3 does not divide hidden_size 32",
        ),
    ],
)
def test_read_decoder_config_refuses(
    llama: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_decoder_config(edited(llama, tmp_path, config=change), dtype="float32")
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "model" / "config.json"))
    assert "\n" not in str(caught.value)


def test_read_decoder_config_refuses_an_unknown_dtype(llama: Path) -> None:
    with pytest.raises(InputError, match="dtype must be float32 or bfloat16, found 'float16'"):
        read_decoder_config(llama, dtype="float16")


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


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_links_out_of_a_target_and_pipes_are_refused(
    smollm2: Path, tmp_path: Path, name: str
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in smollm2.iterdir():
        if path.suffix == ".json":
            (model / path.name).write_bytes(path.read_bytes())
    (model / name).unlink(missing_ok=True)

    def read() -> None:
        if name == "model.safetensors":
            open_safetensors(model)
        read_decoder_config(model, dtype="float32")
        load_tokenizer(model)

    (model / name).symlink_to(smollm2 / "config.json")
    with pytest.raises(InputError, match=f"{name}: a link out of its directory"):
        read()
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(InputError, match=f"{name}: not a regular file|no {name}"):
        read()


def test_a_tokenizer_that_cannot_encode_is_refused(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(smollm2, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": "x"}))
    with pytest.raises(InputError, match="the tokenizer cannot be read: '>' not supported"):
        load_tokenizer(model)


def test_the_default_of_several_chat_templates_is_taken(smollm2: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(smollm2, model, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((model / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    assert load_tokenizer(model).chat_template == "b"
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named[:1]}))
    with pytest.raises(InputError, match=r"the tokenizer cannot be read: .*no default"):
        load_tokenizer(model)


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


def test_load_tokenizer_reads_a_fast_tokenizer(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.is_fast and "<|im_start|>" in tokenizer.chat_template


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, "no tokenizer.json; a target needs its fast tokenizer"),
        ("tokenizer_config.json", None, "no tokenizer_config.json"),
        (
            "tokenizer_config.json",
            '{"tokenizer_class": "PreTrainedTokenizerFast"}',
            "no chat template in",
        ),
        ("tokenizer.json", '{"model": 3}', "the tokenizer cannot be read: "),
    ],
)
def test_load_tokenizer_refuses(
    smollm2: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    for kept in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2 / kept, tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path)
    assert message in str(caught.value) and str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)
