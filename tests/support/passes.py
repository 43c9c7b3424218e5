"""Passes of a target over whole rows, compiled once for each: layers apart, and scanned."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from tiny import stack_layers

from domino_jax.target.decoder import Target, TargetOutput
from domino_jax.target.load import LoadedTarget

EVERY_LAYER = (0, 1, 2, 3)
SCALED = ("llama_linear", "llama3", "qwen3_yarn")


def random_tokens(batch: int, length: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 352, (batch, length), dtype=np.int32)


@functools.cache
def jitted(target: Target) -> Callable[..., TargetOutput]:
    return jax.jit(target.apply)


def whole(loaded: LoadedTarget, tokens: np.ndarray) -> TargetOutput:
    return jitted(Target(loaded.config, EVERY_LAYER))({"params": loaded.params}, tokens)


def scanned(loaded: LoadedTarget, tokens: np.ndarray) -> TargetOutput:
    target = Target(loaded.config, EVERY_LAYER, scan_layers=True)
    return jitted(target)({"params": stack_layers(loaded.params)}, tokens)
