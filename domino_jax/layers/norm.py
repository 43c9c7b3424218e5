"""RMSNorm with a float32 reduction, for target and draft."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.sharding import logical_axes


class RMSNorm(nn.Module):
    """`weight * x / rms(x)` over the last axis, whose mean square is float32 whatever the input."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., D] -> [..., D]
        """Normalises the last axis and returns the type of `x`."""
        weight = self.param(
            "weight", logical_axes(nn.initializers.ones, "norm"), (x.shape[-1],), jnp.float32
        )
        # In bfloat16 a mean over 4096 squares would stop growing long before the end.
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return (x32 * weight.astype(jnp.float32)).astype(x.dtype)
