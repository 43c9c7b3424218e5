"""The shared layers against torch or plain loops, and the types they compute in."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from transformers import LlamaConfig, Qwen3Config

from domino_jax.config.model import DecoderConfig, RopeScaling
from domino_jax.kernels.causal_attention import causal_attention
from domino_jax.layers.attention import AttentionProjections
from domino_jax.layers.dense import Dense, SwiGLU
from domino_jax.layers.norm import RMSNorm
from domino_jax.layers.rotary import rotary, rotary_frequencies, rotate

CFG = DecoderConfig(
    vocab_size=32,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
BF16 = dataclasses.replace(CFG, dtype="bfloat16")
EIGHT_WIDE = dataclasses.replace(CFG, head_dim=8)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def initialised(module: nn.Module, *args: Any, method: str | None = None) -> Any:
    return nn.unbox(module.init(jax.random.key(0), *args, method=method))


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))


def test_dense_multiplies_by_the_transposed_weight() -> None:
    import torch

    x, weight = normal(2, 3, 5), normal(7, 5, seed=1)
    ours = Dense(7, ("mlp", "embed")).apply({"params": {"weight": weight}}, x)
    theirs = torch.nn.functional.linear(torch.tensor(x), torch.tensor(weight))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_dense_keeps_a_float32_master_and_computes_in_its_dtype() -> None:
    x = jnp.asarray(normal(2, 5))
    layer = Dense(7, ("mlp", "embed"), "bfloat16")
    boxed = layer.init(jax.random.key(0), x)["params"]["weight"]
    assert boxed.names == ("mlp", "embed")
    chex.assert_shape(boxed.value, (7, 5))
    chex.assert_type(boxed.value, jnp.float32)
    assert layer.apply({"params": {"weight": boxed.value}}, x).dtype == jnp.bfloat16
    assert (
        Dense(7, ("mlp", "embed"))
        .apply({"params": {"weight": boxed.value}}, x.astype("bfloat16"))
        .dtype
        == jnp.float32
    )


def test_dense_refuses_an_unknown_axis() -> None:
    with pytest.raises(KeyError, match="mpl"):
        Dense(7, ("mpl", "embed")).init(jax.random.key(0), jnp.ones((2, 5)))


def test_rms_norm_equals_torch() -> None:
    import torch

    x, weight = 100 * normal(2, 3, 8), normal(8, seed=1)
    ours = RMSNorm(1e-5).apply({"params": {"weight": weight}}, x)
    theirs = torch.nn.functional.rms_norm(torch.tensor(x), (8,), torch.tensor(weight), 1e-5)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)


def test_rms_norm_of_a_zero_row_is_zero() -> None:
    ours = RMSNorm(1e-6).apply({"params": {"weight": np.ones(8, np.float32)}}, jnp.zeros((1, 8)))
    np.testing.assert_array_equal(ours, np.zeros((1, 8)))


def test_rms_norm_of_bfloat16_takes_float32_statistics() -> None:
    # In bfloat16 a mean over 4096 squares would stop growing long before the end.
    x = jnp.asarray(1 + 0.1 * normal(2, 4096)).astype(jnp.bfloat16)
    weight = np.ones(4096, np.float32)
    ours = RMSNorm(1e-6).apply({"params": {"weight": weight}}, x)
    assert ours.dtype == jnp.bfloat16
    exact = bits(x).astype(np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_array_equal(
        bits(ours), bits(jnp.asarray(exact.astype(np.float32)).astype(jnp.bfloat16))
    )


def test_swiglu_equals_torch() -> None:
    import torch

    x = normal(2, 3, CFG.hidden_size)
    params = initialised(SwiGLU(CFG), x)
    ours = SwiGLU(CFG).apply(params, x)
    gate, up, down = (
        torch.tensor(np.asarray(params["params"][name]["weight"]))
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    theirs = (
        torch.nn.functional.silu(torch.tensor(x) @ gate.T) * (torch.tensor(x) @ up.T)
    ) @ down.T
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-8)
    assert SwiGLU(BF16).apply(params, x).dtype == jnp.bfloat16


@pytest.mark.parametrize(("theta", "head_dim"), [(1e4, 64), (1e6, 128)])
def test_rotary_equals_transformers(theta: float, head_dim: int) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    positions = np.array([[0, 1, 2, 63], [5, 5, 40, 7]], np.int32)
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    tables = rotary(
        jnp.asarray(positions), dataclasses.replace(CFG, head_dim=head_dim, rope_theta=theta)
    )
    np.testing.assert_allclose(tables.cos, cos.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(tables.sin, sin.numpy(), rtol=1e-5, atol=1e-5)

    heads = normal(2, 3, 4, head_dim)
    theirs, _ = apply_rotary_pos_emb(torch.tensor(heads), torch.tensor(heads), cos, sin)
    np.testing.assert_allclose(
        rotate(jnp.asarray(heads), tables), theirs.numpy(), rtol=1e-5, atol=2e-5
    )


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    "yarn_short": {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 5},
    "yarn_every_key": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 30.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn_attention_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,  # the ramp has no width
        "truncate": False,
        "attention_factor": 1.7,
    },
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("theta", "head_dim"), [(5e5, 64), (1e6, 128), (1e4, 16)])
def test_scaled_rotary_frequencies_equal_transformers(
    name: str, theta: float, head_dim: int
) -> None:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    theirs, amplitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)
    cfg = dataclasses.replace(
        CFG, head_dim=head_dim, rope_theta=theta, rope_scaling=RopeScaling(**scaling)
    )
    ours = rotary_frequencies(cfg)
    assert ours.inverse.dtype == np.float32
    np.testing.assert_allclose(
        ours.inverse, theirs.numpy(), rtol=2e-6
    )  # theirs is float32 throughout
    assert ours.amplitude == pytest.approx(amplitude, rel=1e-12)
    plain = rotary_frequencies(dataclasses.replace(cfg, rope_scaling=None))
    assert np.abs(ours.inverse / plain.inverse - 1).max() > 0.3 or name == "yarn_short"

    positions = np.array([[0, 1, 100, 1000]], np.int32)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    tables = rotary(jnp.asarray(positions), cfg)
    np.testing.assert_allclose(
        tables.cos, cos.numpy(), atol=5e-4
    )  # 1000 positions of their rounding
    np.testing.assert_allclose(tables.sin, sin.numpy(), atol=5e-4)


def test_rotary_is_as_exact_as_float32_up_to_100k_positions() -> None:
    positions = np.array([[0, 1, 1000, 8191, 32_767, 99_999, 100_000]], np.int32)
    cfg = dataclasses.replace(CFG, head_dim=128, rope_theta=1e6)
    tables = jax.jit(lambda at: rotary(at, cfg))(positions)
    chex.assert_type(tuple(tables), jnp.float32)
    frequencies = 1e6 ** -(np.arange(0, 128, 2) / 128)
    angles = np.concatenate([positions[..., None] * frequencies] * 2, axis=-1)
    # One rounding of the frequency, one of the product; bfloat16 anywhere is 2**16 times worse.
    bound = 2 * positions[..., None] * 2.0**-24 + 1e-6
    assert (np.abs(tables.cos - np.cos(angles)) <= bound).all()
    assert (np.abs(tables.sin - np.sin(angles)) <= bound).all()


def test_rotate_keeps_the_type_and_computes_in_float32() -> None:
    heads = jnp.asarray(normal(1, 2, 3, 8)).astype(jnp.bfloat16)
    tables = rotary(jnp.arange(3)[None] + 1000, EIGHT_WIDE)
    ours = rotate(heads, tables)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        bits(ours), bits(rotate(heads.astype(jnp.float32), tables).astype(jnp.bfloat16))
    )


def test_rotate_at_position_zero_is_the_identity() -> None:
    heads = jnp.asarray(normal(1, 2, 3, 8))
    np.testing.assert_array_equal(rotate(heads, rotary(jnp.zeros((1, 3), int), EIGHT_WIDE)), heads)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_projections_equal_transformers(qk_norm: bool) -> None:
    import torch
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    cfg = dataclasses.replace(CFG, qk_norm=qk_norm)
    x, mask = normal(2, 5, cfg.hidden_size), np.tril(np.ones((5, 5), bool))[None].repeat(2, 0)
    positions = np.arange(5, dtype=np.int32)[None].repeat(2, 0)
    tables = rotary(jnp.asarray(positions), cfg)

    def run(module: AttentionProjections, x: jax.Array) -> jax.Array:
        keys, values = module.keys_values(x, tables)
        return module.output(causal_attention(module.queries(x, tables), keys, values))

    module = AttentionProjections(cfg)
    params = nn.unbox(module.init(jax.random.key(0), x, method=run))["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.3 * normal(*leaf.shape, seed=leaf.size), params)

    config = Qwen3Config(
        hidden_size=cfg.hidden_size,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        attn_implementation="eager",
    )
    reference = Qwen3Attention(config, layer_idx=0)
    if not qk_norm:
        reference.q_norm = reference.k_norm = torch.nn.Identity()
    weights = {
        f"{name}.weight": torch.tensor(np.asarray(leaf["weight"])) for name, leaf in params.items()
    }
    reference.load_state_dict(weights, strict=True)
    embeddings = Qwen3RotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    bias = torch.where(torch.tensor(mask)[:, None], 0.0, float("-inf"))
    with torch.no_grad():
        theirs, _ = reference(torch.tensor(x), embeddings, bias)
    np.testing.assert_allclose(
        module.apply({"params": params}, x, method=run), theirs.numpy(), rtol=1e-5, atol=1e-6
    )
