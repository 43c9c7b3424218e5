"""Rotary embeddings, scaled ones included, against transformers and exact angles."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_config import CFG
from seeded import bits, normal
from transformers import LlamaConfig

from domino_jax.config.model import RopeScaling
from domino_jax.layers.rotary import rotary, rotary_frequencies, rotate

EIGHT_WIDE = dataclasses.replace(CFG, head_dim=8)


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


@pytest.mark.pitfall(
    "rotary frequencies rounded to bfloat16 by a model-wide cast",
    seen="layers/rotary.py: frequencies cast to bfloat16",
)
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
