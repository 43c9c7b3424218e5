"""Passes of a target, compiled once for each: whole, scanned, and piece by piece."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tiny import stack_layers

from domino_jax.target.load import LoadedTarget
from domino_jax.target.model import Target, TargetOutput

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


def step(loaded: LoadedTarget, tokens: np.ndarray, starts: list[int], cache: Any) -> TargetOutput:
    positions = np.array(starts, np.int32)[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
    return jitted(Target(loaded.config, EVERY_LAYER))(
        {"params": loaded.params}, tokens, positions, cache=cache
    )


def assert_rows_equal(actual: TargetOutput, expected: TargetOutput, rows: list[slice]) -> None:
    """Row b of `actual` equals the positions `rows[b]` of row b of `expected`."""
    for row, piece in enumerate(rows):
        np.testing.assert_allclose(actual.hidden[row], expected.hidden[row, piece], atol=2e-5)
        np.testing.assert_allclose(actual.features[row], expected.features[row, piece], atol=2e-5)
