"""The dual cross-entropy over the vocabulary, in pieces that bound its memory, and the acceptance statistics."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from domino_jax.sharding import constrain
from domino_jax.target.model import vocabulary_logits


class TokenLoss(NamedTuple):
    """What the logits of each prediction say of its label, all [...].

    `nll` float32 is the negative log-likelihood, `prediction` int32 the most likely token, `divergence` float32
    KL(target || draft), None where the target's states were not given.
    """

    nll: jax.Array
    prediction: jax.Array
    divergence: jax.Array | None = None


class AcceptanceStats(NamedTuple):
    """Mean acceptance length (bonus token included), its sum over blocks and the number of non-empty blocks."""

    mean: jax.Array
    total: jax.Array
    blocks: jax.Array


def dual_cross_entropy(
    hidden: jax.Array,
    target_ids: jax.Array,
    *,
    lm_head: jax.Array,
    low_rank: jax.Array | None = None,
    expansion: jax.Array | None = None,
    target_states: jax.Array | None = None,
    output_logits: Callable[[jax.Array], jax.Array] = lambda logits: logits,
    chunk_blocks: int = 0,
) -> tuple[TokenLoss, TokenLoss]:
    """Cross-entropy of the corrected logits `U + E` and of the base logits `U`, in one pass over the vocabulary.

    Args:
        hidden: [B, N, M, D], backbone states of the predictions.
        target_ids: int32 [B, N, M].
        lm_head: [V, D], frozen.
        low_rank: [B, N, M, R], the head's states, zero where the logits stay uncorrected; None without a head.
        expansion: [V, R], the head's last product.
        target_states: [B, N, M, D], the target's states after its final norm that predict the same tokens; None
            leaves the divergence out.
        output_logits: what the target's head makes of its product, applied before the correction is added.
        chunk_blocks: blocks whose logits exist at the same time; each piece is recomputed in the backward pass.
            0 keeps the logits of all blocks.
    Returns:
        Final and base `TokenLoss` of [B, N, M], the same twice without a head. Logits and log-sum-exp are float32.
    """
    head = jax.lax.stop_gradient(lm_head)

    def losses(
        hidden: jax.Array, ids: jax.Array, low_rank: jax.Array | None, target: jax.Array | None
    ) -> tuple[TokenLoss, TokenLoss]:
        base_logits = constrain(output_logits(vocabulary_logits(hidden, head)), "batch", None, "vocab")
        wanted = None
        if target is not None:
            wanted = jax.lax.stop_gradient(jax.nn.log_softmax(output_logits(vocabulary_logits(target, head))))
        base = _token_loss(base_logits, ids, wanted)
        if low_rank is None or expansion is None:
            return base, base
        return _token_loss(base_logits + vocabulary_logits(low_rank, expansion), ids, wanted), base

    batch, blocks, size = target_ids.shape
    rows = (hidden, target_ids, low_rank, target_states)
    if chunk_blocks == 0 or chunk_blocks >= blocks:
        flat = jax.tree.map(lambda x: x.reshape(batch, blocks * size, *x.shape[3:]), rows)
        result = losses(*flat)
    else:
        pieces = -(-blocks // chunk_blocks)

        def split(x: jax.Array) -> jax.Array:  # [B, N, M, ...] -> [pieces, B, chunk * M, ...]
            x = jnp.pad(x, ((0, 0), (0, pieces * chunk_blocks - blocks)) + ((0, 0),) * (x.ndim - 2))
            return x.reshape(batch, pieces, chunk_blocks * size, *x.shape[3:]).swapaxes(0, 1)

        mapped = jax.lax.map(lambda piece: jax.checkpoint(losses)(*piece), jax.tree.map(split, rows))
        result = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, -1)[:, : blocks * size], mapped)
    final, base = jax.tree.map(lambda x: x.reshape(batch, blocks, size), result)
    return final, base


def _token_loss(logits: jax.Array, ids: jax.Array, wanted: jax.Array | None) -> TokenLoss:
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    divergence = None
    if wanted is not None:  # log-probabilities of the target
        divergence = jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits)), axis=-1)
    return TokenLoss(nll, jnp.argmax(logits, axis=-1).astype(jnp.int32), divergence)


def compute_accept_len(pred_ids: jax.Array, target_ids: jax.Array, valid_mask: jax.Array) -> jax.Array:
    """Drafted tokens accepted before the first mismatch of each block.

    Args:
        pred_ids: int [B, N, M].
        target_ids: int [B, N, M].
        valid_mask: bool [B, N, M]; other positions neither end the prefix nor add to it.
    Returns:
        float32 [B, N].
    Source: NeMo AutoModel 0.7.0, `compute_accept_len`.
    """
    accepted = jnp.cumprod(((pred_ids == target_ids) | ~valid_mask).astype(jnp.int32), axis=-1)
    return jnp.sum(accepted * valid_mask, axis=-1).astype(jnp.float32)


def acceptance_stats(pred_ids: jax.Array, target_ids: jax.Array, valid_mask: jax.Array) -> AcceptanceStats:
    """Acceptance over blocks with at least one valid position; each counts its accepted tokens plus the bonus token.

    Shapes as in `compute_accept_len`; three float32 scalars.
    Source: NeMo AutoModel 0.7.0, `compute_acceptance_stats`.
    """
    used = jnp.any(valid_mask, axis=-1)
    total = jnp.sum(jnp.where(used, compute_accept_len(pred_ids, target_ids, valid_mask) + 1.0, 0.0))
    blocks = jnp.sum(used.astype(jnp.float32))
    return AcceptanceStats(total / jnp.maximum(blocks, 1.0), total, blocks)
