"""Seeded random arrays, and what is exact in a narrower type."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32))
