"""A draft has layers of its target's kind and may start as its top: the two share these parts.

They are dense, RMSNorm, rotary embedding, SwiGLU and attention's projections. Weights are stored
`[out, in]`, the layout of the checkpoints that this project reads and writes. Activations of
attention are heads first, `[B, heads, T, head_dim]`.
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.kernels.products import project
from domino_jax.kernels.scale import scaled
from domino_jax.model_config import YARN_BETA_FAST, YARN_BETA_SLOW, DecoderShape, RopeScaling
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
        product = project(x.astype(self.dtype), weight.astype(self.dtype))
        if not self.use_bias:
            return product
        zeros = logical_axes(nn.initializers.zeros, self.axes[0])
        return product + self.param("bias", zeros, (self.features,), jnp.float32).astype(self.dtype)


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
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return scaled(x32, weight.astype(jnp.float32)).astype(x.dtype)


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


class Rotary(NamedTuple):
    """Cosines and sines of the rotary angles, float32 [B, T, head_dim].

    Both are multiplied by YaRN's attention factor, if there is one.
    """

    cos: jax.Array
    sin: jax.Array


class RotaryFrequencies(NamedTuple):
    """`inverse` float32 [head_dim / 2], radians a position; `amplitude` multiplies both tables."""

    inverse: np.ndarray
    amplitude: float


def rotary_frequencies(cfg: DecoderShape) -> RotaryFrequencies:
    """The rotary frequencies of a decoder, `theta ** (-2 i / head_dim)` stretched by its scaling.

    All of it is float64 until the last rounding: nothing here is traced.

    Args:
        cfg: `head_dim`, `rope_theta` and `rope_scaling` are read.
    Returns:
        `RotaryFrequencies`. The amplitude is 1 except for YaRN, where it is `attention_factor`, or
        follows from the factor and the two mscales.
    Source: RoFormer (arXiv:2104.09864); Llama 3.1's and YaRN's (arXiv:2309.00071) blends as
    transformers 5 reads them.
    """
    pair = np.arange(cfg.head_dim // 2)
    frequencies = cfg.rope_theta ** (-2 * pair / cfg.head_dim)
    scaling, amplitude = cfg.rope_scaling, 1.0
    if scaling is not None:
        kept: np.ndarray | float = 0.0  # share of each frequency that is not divided by the factor
        original = scaling.original_max_position_embeddings or 0
        if scaling.rope_type == "llama3":
            low, high = scaling.low_freq_factor or 0.0, scaling.high_freq_factor or 0.0
            turns = original * frequencies / (2 * math.pi)
            kept = np.clip((turns - low) / (high - low), 0, 1)
        elif scaling.rope_type == "yarn":
            kept = 1 - _yarn_ramp(cfg, scaling, original)
            amplitude = _yarn_amplitude(scaling)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    return RotaryFrequencies(frequencies.astype(np.float32), amplitude)


def _yarn_ramp(cfg: DecoderShape, scaling: RopeScaling, original: int) -> np.ndarray:
    """Share of each frequency that YaRN divides by the factor, [head_dim / 2].

    From 0 (many turns within the pretraining length) to 1 (few).
    """

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns that often within the pretraining length."""
        return (
            cfg.head_dim
            * math.log(original / (turns * 2 * math.pi))
            / (2 * math.log(cfg.rope_theta))
        )

    first = pair_with(scaling.beta_fast or YARN_BETA_FAST)
    last = pair_with(scaling.beta_slow or YARN_BETA_SLOW)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # transformers bounds the end by head_dim - 1, though there are only half as many pairs.
    first, last = max(first, 0), min(last, cfg.head_dim - 1)
    # A ramp without width is a step, as in transformers.
    width = last - first if last != first else 0.001
    return np.clip((np.arange(cfg.head_dim // 2) - first) / width, 0, 1)


def _yarn_amplitude(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(scaling.factor) + 1

    if scaling.mscale is None or scaling.mscale_all_dim is None:
        return temperature(1.0)
    return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)


def rotary(positions: jax.Array, cfg: DecoderShape) -> Rotary:
    """Rotary tables for integer positions, always in float32.

    Args:
        positions: int [B, T].
        cfg: the decoder whose heads are rotated; see `rotary_frequencies`.
    Returns:
        `Rotary` of float32 [B, T, head_dim]; both halves of the last axis are equal (half-rotation
        layout).
    Source: RoFormer (arXiv:2104.09864), in the half-split layout of Llama and Qwen checkpoints.
    """
    frequencies, amplitude = rotary_frequencies(cfg)
    # bfloat16 counts to 256: beyond, neighbouring positions would have the same angles.
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rotary(jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude)


def rotate(x: jax.Array, tables: Rotary) -> jax.Array:
    """Rotates heads by their position.

    Args:
        x: [B, heads, T, head_dim].
        tables: `Rotary` of [B, T, head_dim].
    Returns:
        An array like `x`; the arithmetic is float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x * tables.cos[:, None] + turned * tables.sin[:, None]).astype(x.dtype)


class AttentionProjections(nn.Module):
    """The weights of grouped attention: q, k, v, o; by family, biases of q, k, v, norms of q, k."""

    cfg: DecoderShape
    bias: bool = False

    def setup(self) -> None:
        """Creates the four projections and the two norms."""
        cfg, bias = self.cfg, self.bias
        self.q_proj = Dense(
            cfg.num_attention_heads * cfg.head_dim, ("heads", "embed"), cfg.dtype, bias
        )
        self.k_proj = Dense(
            cfg.num_key_value_heads * cfg.head_dim, ("kv_heads", "embed"), cfg.dtype, bias
        )
        self.v_proj = Dense(
            cfg.num_key_value_heads * cfg.head_dim, ("kv_heads", "embed"), cfg.dtype, bias
        )
        # Never a bias: Qwen2 has biases of q, k and v alone.
        self.o_proj = Dense(cfg.hidden_size, ("embed", "heads"), cfg.dtype)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.rms_norm_eps)
            self.k_norm = RMSNorm(cfg.rms_norm_eps)

    def queries(self, x: jax.Array, tables: Rotary) -> jax.Array:
        """Rotated queries, [B, T, D] -> [B, H, T, head_dim]."""
        q = self._heads(self.q_proj(x))
        return rotate(
            self.q_norm(q).swapaxes(1, 2) if self.cfg.qk_norm else q.swapaxes(1, 2), tables
        )

    def keys_values(self, x: jax.Array, tables: Rotary) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values, [B, T, D] -> two [B, KV, T, head_dim]."""
        k = self._heads(self.k_proj(x))
        k = rotate(self.k_norm(k).swapaxes(1, 2) if self.cfg.qk_norm else k.swapaxes(1, 2), tables)
        return k, self._heads(self.v_proj(x)).swapaxes(1, 2)

    def output(self, heads: jax.Array) -> jax.Array:
        """Joins the heads, [B, H, T, head_dim] -> [B, T, D]."""
        batch, count, length, width = heads.shape
        return self.o_proj(heads.swapaxes(1, 2).reshape(batch, length, count * width))

    # [B, T, heads * head_dim] -> [B, T, heads, head_dim]
    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.cfg.head_dim)
