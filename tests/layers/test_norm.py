"""RMSNorm against torch, and its statistics in float32."""

import jax.numpy as jnp
import numpy as np
from seeded import bits, normal

from domino_jax.layers.norm import RMSNorm


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
