"""The dual cross-entropy and the acceptance statistics against torch, NeMo and plain loops."""

import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nemo_automodel.components.speculative.dflash import core

from domino_jax.training.loss import TokenLoss, acceptance_stats, compute_accept_len, dual_cross_entropy

BATCH, BLOCKS, SIZE, WIDTH, RANK, VOCABULARY = 2, 7, 3, 16, 6, 110


class Inputs(NamedTuple):
    hidden: np.ndarray
    lm_head: np.ndarray
    low_rank: np.ndarray
    expansion: np.ndarray


def random_inputs() -> tuple[Inputs, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = ((BATCH, BLOCKS, SIZE, WIDTH), (VOCABULARY, WIDTH), (BATCH, BLOCKS, SIZE, RANK), (VOCABULARY, RANK))
    inputs = Inputs(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    return inputs, rng.integers(0, VOCABULARY, shapes[0][:3]).astype(np.int32)


def losses(inputs: Inputs, ids: np.ndarray, *, chunk_blocks: int = 0) -> tuple[TokenLoss, TokenLoss]:
    return dual_cross_entropy(
        inputs.hidden,
        ids,
        lm_head=inputs.lm_head,
        low_rank=inputs.low_rank,
        expansion=inputs.expansion,
        chunk_blocks=chunk_blocks,
    )


def mixed(inputs: Inputs, ids: np.ndarray, *, chunk_blocks: int) -> tuple[jax.Array, tuple[TokenLoss, TokenLoss]]:
    """A scalar in which every prediction of both losses has its own weight, and the losses."""
    weights = np.random.default_rng(1).random((2, *ids.shape)).astype(np.float32)
    final, base = losses(inputs, ids, chunk_blocks=chunk_blocks)
    return jnp.sum(final.nll * weights[0] + base.nll * weights[1]), (final, base)


RUN = jax.jit(jax.value_and_grad(mixed, has_aux=True), static_argnames="chunk_blocks")


def test_dual_cross_entropy_equals_torch() -> None:
    inputs, ids = random_inputs()
    hidden, lm_head, low_rank, expansion = map(torch.tensor, inputs)
    base_logits = hidden @ lm_head.T
    targets = torch.tensor(ids.astype(np.int64)).flatten()
    for found, logits in zip(losses(inputs, ids), (base_logits + low_rank @ expansion.T, base_logits), strict=True):
        expected = F.cross_entropy(logits.flatten(0, 2), targets, reduction="none").reshape(ids.shape)
        chex.assert_type([found.nll, found.prediction], [jnp.float32, jnp.int32])
        np.testing.assert_allclose(found.nll, expected.numpy(), rtol=1e-5)
        np.testing.assert_array_equal(found.prediction, logits.argmax(dim=-1).numpy())


def test_dual_cross_entropy_without_a_head_gives_the_base_twice() -> None:
    inputs, ids = random_inputs()
    final, base = dual_cross_entropy(inputs.hidden, ids, lm_head=inputs.lm_head)
    chex.assert_trees_all_equal(final, base)
    chex.assert_trees_all_close(base, losses(inputs, ids)[1], rtol=1e-6)


@pytest.mark.parametrize("chunk_blocks", [1, 3, 7, 50])  # 3 leaves a last piece of one block
def test_dual_cross_entropy_in_chunks_equals_one_piece_in_values_and_gradients(chunk_blocks: int) -> None:
    inputs, ids = random_inputs()
    (_, whole), whole_gradient = RUN(inputs, ids, chunk_blocks=0)
    (_, pieces), pieces_gradient = RUN(inputs, ids, chunk_blocks=chunk_blocks)
    chex.assert_shape(pieces[0].nll, (BATCH, BLOCKS, SIZE))
    chex.assert_trees_all_close(pieces, whole, rtol=1e-6)
    chex.assert_trees_all_close(pieces_gradient, whole_gradient, rtol=1e-5, atol=1e-5)
    for name in ("hidden", "low_rank", "expansion"):
        assert np.linalg.norm(getattr(whole_gradient, name)) > 1


def test_dual_cross_entropy_in_chunks_holds_the_logits_of_one_chunk() -> None:
    blocks, size, vocabulary, width = 32, 4, 4000, 8

    def temporary_bytes(blocks: int, chunk_blocks: int) -> int:
        def total(hidden: jax.Array, low_rank: jax.Array, head: jax.Array, expansion: jax.Array) -> jax.Array:
            ids = jnp.zeros(hidden.shape[:-1], jnp.int32)
            losses = dual_cross_entropy(
                hidden, ids, lm_head=head, low_rank=low_rank, expansion=expansion, chunk_blocks=chunk_blocks
            )
            return sum(jnp.sum(loss.nll) for loss in losses)

        states, table = jnp.zeros((1, blocks, size, width)), jnp.zeros((vocabulary, width))
        compiled = jax.jit(jax.grad(total, argnums=(0, 1, 3))).lower(states, states, table, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = blocks * size * vocabulary * 4
    assert temporary_bytes(blocks, 0) >= logits
    assert temporary_bytes(blocks, 2) < logits / 2
    # Four times the blocks: only states grow, 64 bytes a prediction, not logits of 16,000.
    assert temporary_bytes(4 * blocks, 2) - temporary_bytes(blocks, 2) < logits / 20


@pytest.mark.parametrize("chunk_blocks", [0, 3])
def test_dual_cross_entropy_leaves_the_targets_head_frozen(chunk_blocks: int) -> None:
    inputs, ids = random_inputs()
    _, gradient = RUN(inputs, ids, chunk_blocks=chunk_blocks)
    assert not np.any(gradient.lm_head)


def test_dual_cross_entropy_of_bfloat16_states_has_float32_logits() -> None:
    inputs, ids = random_inputs()
    halves = Inputs(*(jnp.asarray(x, jnp.bfloat16) for x in inputs))
    rounded = Inputs(*(np.asarray(x, np.float32) for x in halves))
    states = Inputs(halves.hidden, jnp.asarray(rounded.lm_head), halves.low_rank, jnp.asarray(rounded.expansion))
    for found, exact in zip(losses(states, ids), losses(rounded, ids), strict=True):
        chex.assert_type(found.nll, jnp.float32)
        # Products of bfloat16 numbers are exact in float32, so rounded logits would show as 1e-3 here.
        np.testing.assert_allclose(found.nll, exact.nll, rtol=1e-5)


def random_predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    targets = rng.integers(0, 50, (4, 30, 6))
    predictions = np.where(rng.random(targets.shape) < 0.6, targets, targets + 1)
    valid = rng.random(targets.shape) < 0.7
    valid[0, :5] = False  # blocks without any supervised position
    valid[1, :5] = True
    return predictions, targets, valid


def slow_accept_len(predictions: np.ndarray, targets: np.ndarray, valid: np.ndarray) -> np.ndarray:
    lengths = np.zeros(valid.shape[:2])
    for b, n in itertools.product(*map(range, lengths.shape)):
        for k in range(valid.shape[2]):
            if valid[b, n, k] and predictions[b, n, k] != targets[b, n, k]:
                break
            lengths[b, n] += valid[b, n, k]
    return lengths


def test_compute_accept_len_equals_the_loop_and_nemo() -> None:
    arrays = random_predictions()
    found = compute_accept_len(*map(jnp.asarray, arrays))
    chex.assert_type(found, jnp.float32)
    np.testing.assert_array_equal(found, slow_accept_len(*arrays))
    np.testing.assert_array_equal(found, core.compute_accept_len(*map(torch.tensor, arrays)).numpy())
    assert len(np.unique(found)) > 4


def test_acceptance_stats_equal_the_loop_and_nemo() -> None:
    arrays = random_predictions()
    used = arrays[2].any(axis=-1)
    found = acceptance_stats(*map(jnp.asarray, arrays))
    chex.assert_type(list(found), jnp.float32)
    total = (slow_accept_len(*arrays) + 1)[used].sum()
    assert not used.all()
    np.testing.assert_allclose(found, (total / used.sum(), total, used.sum()), rtol=1e-6)
    theirs = core.compute_acceptance_stats(*map(torch.tensor, arrays))
    np.testing.assert_allclose(found, [float(x) for x in theirs], rtol=1e-6)


def test_acceptance_stats_of_nothing_are_zero() -> None:
    ids = jnp.ones((2, 3, 4), jnp.int32)
    assert [float(x) for x in acceptance_stats(ids, ids, jnp.zeros(ids.shape, bool))] == [0.0, 0.0, 0.0]
