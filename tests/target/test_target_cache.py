"""Passes with a cache, in pieces, rewound and batched, against the whole pass."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from doubles import slow_after
from passes import EVERY_LAYER, SCALED, jitted, random_tokens, whole
from tiny import stack_layers

from domino_jax.target.decoder import Target, TargetOutput
from domino_jax.target.load import LoadedTarget, load_target


def step(loaded: LoadedTarget, tokens: np.ndarray, starts: list[int], cache: Any) -> TargetOutput:
    positions = np.array(starts, np.int32)[:, None] + np.arange(tokens.shape[1], dtype=np.int32)
    return jitted(Target(loaded.config, EVERY_LAYER))(
        {"params": loaded.params}, tokens, positions, cache=cache
    )


def empty(loaded: LoadedTarget, batch: int = 2) -> Any:
    return Target(loaded.config).empty_cache(batch=batch, cache_len=16)


def assert_rows_equal(actual: TargetOutput, expected: TargetOutput, rows: list[slice]) -> None:
    """Row b of `actual` equals the positions `rows[b]` of row b of `expected`."""
    for row, piece in enumerate(rows):
        np.testing.assert_allclose(actual.hidden[row], expected.hidden[row, piece], atol=2e-5)
        np.testing.assert_allclose(actual.features[row], expected.features[row, piece], atol=2e-5)


FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", *SCALED)


@pytest.mark.parametrize("batch", slow_after(1, [2, 1]))
def test_scanned_layers_with_a_cache_equal_unrolled(loaded: LoadedTarget, batch: int) -> None:
    tokens = random_tokens(batch, 9)
    apart = Target(loaded.config, capture=(0, 3))
    implementations = [
        (apart, loaded.params),
        (replace(apart, scan_layers=True), stack_layers(loaded.params)),
    ]
    caches = [target.empty_cache(batch=batch, cache_len=12) for target, _ in implementations]
    for start, stop in ((0, 6), (6, 7), (5, 9)):  # the last pass rewinds
        positions = np.tile(np.arange(start, stop, dtype=np.int32), (batch, 1))
        outs = [
            jitted(target)({"params": params}, tokens[:, start:stop], positions, cache=cache)
            for (target, params), cache in zip(implementations, caches, strict=True)
        ]
        caches = [out.cache for out in outs]
        chex.assert_trees_all_close(outs[1][:2], outs[0][:2], atol=1e-5)
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *caches[0])
    chex.assert_trees_all_close(caches[1], stacked, atol=1e-5)


# One row is written by another code path.
@pytest.mark.parametrize(
    ("kind", "batch"), slow_after(4, [("llama", 1), *((kind, 2) for kind in FAMILIES[1:])])
)
def test_cached_pieces_equal_the_whole_pass(
    tiny: Callable[..., Any], kind: str, batch: int
) -> None:
    loaded, tokens = load_target(tiny(kind, tied=True).directory), random_tokens(batch, 14)
    expected, cache, start = whole(loaded, tokens), empty(loaded, batch), 0
    for length in (6, 1, 6, 1):
        out = step(loaded, tokens[:, start : start + length], [start] * batch, cache)
        assert_rows_equal(out, expected, [slice(start, start + length)] * batch)
        cache, start = out.cache, start + length


def test_rewound_cache_hides_what_stood_there(loaded: LoadedTarget) -> None:
    tokens = random_tokens(2, 12)
    expected = whole(loaded, tokens)
    cache = step(loaded, tokens[:, :6], [0, 0], empty(loaded)).cache
    # Six wrong tokens leave stale keys at 6..11; the right ones come back in pieces over them.
    cache = step(loaded, random_tokens(2, 6, seed=5), [6, 6], cache).cache
    for start in (6, 9):
        out = step(loaded, tokens[:, start : start + 3], [start] * 2, cache)
        assert_rows_equal(out, expected, [slice(start, start + 3)] * 2)
        cache = out.cache


def test_batched_rows_may_stand_at_different_positions(loaded: LoadedTarget) -> None:
    tokens = random_tokens(2, 12)
    expected = whole(loaded, tokens)
    cache = step(loaded, tokens[:, :6], [0, 0], empty(loaded)).cache
    for starts in ([6, 3], [7, 4]):  # then all are rewound by two
        rows = [slice(start, start + 3) for start in starts]
        pieces = np.stack([tokens[row, piece] for row, piece in enumerate(rows)])
        out = step(loaded, pieces, starts, cache)
        assert_rows_equal(out, expected, rows)
        cache = out.cache


def test_documents_refuse_a_cache(loaded: LoadedTarget) -> None:
    tokens, cache = random_tokens(1, 4), empty(loaded, 1)
    with pytest.raises(ValueError, match="documents have no cache"):
        Target(loaded.config).apply(
            {"params": loaded.params}, tokens, cache=cache, documents=np.zeros((1, 4), int)
        )
