"""The keys of a config.json: older and newer forms are read, all else is one clear line."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from copies import ABSENT, edited

from domino_jax.base.errors import InputError
from domino_jax.config.model import DecoderConfig, RopeScaling
from domino_jax.target.decoder_keys import read_decoder_config

YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


YARN_IN_OLD_FILES = {"factor": 4.0, "original_max_position_embeddings": 32}


SCALED = RopeScaling(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
SHORT = ("rope_scaling", SCALED)
WHOLE = ("rope_scaling", dataclasses.replace(SCALED, original_max_position_embeddings=128))


MIXTURE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def llama3(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": LLAMA3 | changes}


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": YARN | changes}


def mixture(**changes: Any) -> dict[str, Any]:
    return MIXTURE | changes


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
        ({"rope_parameters": {"rope_theta": 78.0, "type": "default"}}, "rope_theta", 78.0),
        ({"rope_parameters": {"rope_theta": 5e3, "partial_rotary_factor": 1.0}}, "qk_norm", False),
        ({"rope_parameters": None, "rope_scaling": None}, "rope_theta", 10_000.0),
        ({"head_dim": ABSENT}, "head_dim", 8),
        ({"head_dim": None}, "head_dim", 8),
        ({"num_key_value_heads": ABSENT}, "num_key_value_heads", 4),
        ({"tie_word_embeddings": ABSENT}, "tie_word_embeddings", False),
        ({"attention_bias": ABSENT, "mlp_bias": None, "hidden_act": ABSENT}, "qk_norm", False),
        ({"model_type": "qwen2", "attention_bias": ABSENT}, "attention_bias", True),
        (MIXTURE, "num_experts", 8),
        (MIXTURE | {"num_experts": ABSENT, "num_local_experts": 8}, "num_experts", 8),
        (mixture(norm_topk_prob=ABSENT), "norm_topk_prob", False),
        (yarn(original_max_position_embeddings=None), *WHOLE),
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
        (yarn(attention_factor=None, beta_fast=None), *SHORT),
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


@pytest.mark.pitfall(
    "rotary base or partial factor read from the wrong key, or written under one key only",
    seen=(
        "formats/rope_keys.py: the first base taken though another differs; "
        "target/decoder_keys.py: partial_rotary_factor accepted"
    ),
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; supported: llama, qwen2, qwen3,"),
        ({"model_type": ABSENT}, "model_type is None"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
            "rope_type is 'dynamic'; supported: d",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling {'rope_type': 'linear', ",
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
            "original_max_position_embeddings 64 and rope_parameters.original_max_position_emb",
        ),
        (llama3(factor=None), "rope_scaling: missing factor"),
        (llama3(factor="big"), "rope_scaling: factor: expected float, found 'big'"),
        (llama3(factr=8.0), "rope_scaling: unknown key 'factr'; did you mean 'factor'?"),
        (llama3(low_freq_factor=None), "rope_type 'llama3' needs low_freq_f"),
        (llama3(beta_fast=32), "rope_type 'llama3' does not read beta_fast"),
        (llama3(high_freq_factor=1.0), "low_freq_factor 1.0 must be below high_freq_factor"),
        (llama3(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; not supported"),
        (yarn(mscale=1.0), "mscale and mscale_all_dim go together"),
        (yarn(factor=0.5), "rope_scaling: factor must be at least 1, found 0.5"),
        (yarn(beta_slow=-1), "rope_scaling: beta_slow must be positive, found -1.0"),
        (yarn(beta_slow=40), "beta_fast 32.0 must not be below beta_slow 40.0"),
        (yarn(truncate=None), "rope_scaling: truncate: expected bool, found None"),
        ({"rope_parameters": None, "rope_theta": 1.0}, "rope_theta must be above 1, found 1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention is {'rope"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is 0.5",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a mapping"),
        ({"rope_theta": 4.0}, "rope_theta 4.0 and rope_parameters.rope_theta 5000.0 contradict"),
        ({"attention_bias": True}, "attention_bias is True; supported: False"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True; supported: F"),
        ({"model_type": "qwen2", "attention_bias": False}, "attention_bias is False; supported: T"),
        (mixture(mlp_only_layers=[1]), "mlp_only_layers is [1]; supported: []"),
        (mixture(decoder_sparse_step=2), "decoder_sparse_step is 2; supported: 1"),
        (mixture(num_experts=0), "num_experts is 0; expected a mixture"),
        (mixture(num_experts=ABSENT), "missing num_experts"),
        (mixture(num_local_experts=4), "num_experts 8 and num_local_experts 4 contradict"),
        (mixture(num_experts_per_tok=ABSENT), "missing num_experts_per_tok"),
        (mixture(num_experts_per_tok=9), "num_experts_per_tok 9 must not exceed num_experts 8"),
        (mixture(moe_intermediate_size=0), "moe_intermediate_size must be positive, found 0"),
        (mixture(norm_topk_prob="yes"), "norm_topk_prob: expected bool, found 'yes'"),
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
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is {'quant_"),
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
