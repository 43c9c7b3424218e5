"""Linear layers, stored as checkpoints store them, `[out, in]`, and the gated MLP.

A draft's parameters are float32 masters, cast at each use. A target's have the compute type
already: its loader makes them, not `init`.

    x [..., in] @ weight [out, in].T (+ bias [out]) -> [..., out]
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.config.model import DecoderShape
from domino_jax.kernels.matmul import linear
from domino_jax.sharding import constrain, logical_axes


class Dense(nn.Module):
    """`x @ weight.T`, plus `bias` if there is one; float32 masters, `weight` as `[features, in]`.

    Attributes:
        features: width of the output.
        axes: logical axes of the weight, (out, in).
        dtype: type of the product.
        use_bias: add a bias of `[features]`.
    """

    features: int
    axes: tuple[str, str]
    dtype: str = "float32"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [..., in] -> [..., features]
        """Maps the last axis of `x` to `features`."""
        init = nn.initializers.normal(stddev=0.02)
        weight = self.param(
            "weight", logical_axes(init, *self.axes), (self.features, x.shape[-1]), jnp.float32
        )
        # The master stays float32 and is cast at each use: bfloat16's eight bits would lose the
        # small updates.
        product = linear(x.astype(self.dtype), weight.astype(self.dtype))
        if not self.use_bias:
            return product
        zeros = logical_axes(nn.initializers.zeros, self.axes[0])
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return product + bias.astype(self.dtype)


@jax.checkpoint
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`; the backward pass recomputes its parts, cheaper than keeping them all."""
    return nn.silu(gate) * up


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, bias-free."""

    cfg: DecoderShape

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        """Applies the gated feed-forward layer."""
        cfg = self.cfg
        gate = Dense(cfg.intermediate_size, ("mlp", "embed"), cfg.dtype, name="gate_proj")(x)
        up = Dense(cfg.intermediate_size, ("mlp", "embed"), cfg.dtype, name="up_proj")(x)
        hidden = constrain(_gated(gate, up), "batch", "length", "mlp")
        return Dense(cfg.hidden_size, ("embed", "mlp"), cfg.dtype, name="down_proj")(hidden)
