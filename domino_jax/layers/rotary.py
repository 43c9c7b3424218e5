"""Rotary embeddings in the half-split layout of Llama and Qwen checkpoints.

An angle that is off by a rounding moves every score: frequencies are float64 until their last
rounding, angles always float32.

    positions [B, T] -> angles [B, T, head_dim / 2], twice side by side -> cos, sin [B, T, head_dim]
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.config.model import YARN_BETA_FAST, YARN_BETA_SLOW, DecoderShape, RopeScaling


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

    The amplitude is 1 except for YaRN, where it is `attention_factor`, or follows from the factor
    and the two mscales. Nothing here is traced.
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
            low = scaling.low_freq_factor or 0.0
            high = scaling.high_freq_factor or 0.0
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
        first = math.floor(first)
        last = math.ceil(last)
    # transformers bounds the end by head_dim - 1, though there are only half as many pairs.
    first = max(first, 0)
    last = min(last, cfg.head_dim - 1)
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
        cfg: the decoder whose heads are rotated.
    Returns:
        `Rotary` of float32 [B, T, head_dim]; both halves of the last axis are equal.
    """
    frequencies, amplitude = rotary_frequencies(cfg)
    # bfloat16 counts to 256: beyond, neighbouring positions would have the same angles.
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies)
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rotary(jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude)


def rotate(x: jax.Array, tables: Rotary) -> jax.Array:
    """Rotates heads [B, heads, T, head_dim] by their position; the arithmetic is float32."""
    # A pair is (i, i + head_dim / 2) here, and not two neighbours as in GGUF files of Llama.
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return (x * tables.cos[:, None] + rotated * tables.sin[:, None]).astype(x.dtype)
