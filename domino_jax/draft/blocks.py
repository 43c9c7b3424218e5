"""Training blocks: which anchors are drawn, what each block holds and what its positions must predict."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Packing(NamedTuple):
    """Where documents lie in packed rows.

    `position_ids` int32 [B, S] restarts at each document, `seq_lens` int32 [B, documents] are lengths (0 is padding),
    `doc_remaining` int32 [B, S] counts the real tokens that follow in the same document.
    """

    position_ids: jax.Array
    seq_lens: jax.Array
    doc_remaining: jax.Array


class Blocks(NamedTuple):
    """The drawn blocks of a batch.

    `noise_ids` int32 [B, N, K] is the anchor's token followed by mask tokens, `positions` int32 [B, N, K] its rotary
    positions. Prediction m of a block is the token at `anchor + 1 + m`: `target_ids` int32 [B, N, M], supervised where
    `mask` bool [B, N, M]; `previous_ids` int32 [B, N, M] is the token just before it.
    """

    noise_ids: jax.Array
    positions: jax.Array
    previous_ids: jax.Array
    target_ids: jax.Array
    mask: jax.Array


def anchor_candidates(loss_mask: jax.Array, *, block_size: int, doc_remaining: jax.Array | None = None) -> jax.Array:
    """Positions a block may start at.

    Args:
        loss_mask: [B, S], above 0.5 where the token is supervised.
        block_size: K.
        doc_remaining: int [B, S] for packed rows; the block must end inside its document.
    Returns:
        bool [B, S]: supervised and at most `max(S - K, 0)`.
    Source: NeMo AutoModel 0.7.0, `DFlashTrainerModule._sample_anchor_positions`.
    """
    length = loss_mask.shape[1]
    candidates = (loss_mask > 0.5) & (jnp.arange(length) <= max(length - block_size, 0))
    return candidates if doc_remaining is None else candidates & (doc_remaining >= block_size - 1)


def sample_anchors(key: jax.Array, candidates: jax.Array, *, num_anchors: int) -> tuple[jax.Array, jax.Array]:
    """Draws anchors uniformly without replacement into a static number of slots.

    Args:
        key: a PRNG key.
        candidates: bool [B, S].
        num_anchors: N; more than the candidates leaves slots unused.
    Returns:
        `anchors` int32 [B, N], ascending over the used slots and 0 in the unused ones, which come last;
        `keep` bool [B, N], False for an unused slot.
    """
    batch, length = candidates.shape
    drawn = min(num_anchors, length)
    ranks = jnp.where(candidates, jax.random.uniform(key, (batch, length)), 2.0)
    order = jnp.argsort(ranks, axis=1)[:, :drawn]
    keep = jnp.take_along_axis(candidates, order, axis=1)
    anchors = jnp.sort(jnp.where(keep, order, length), axis=1)
    anchors = jnp.pad(anchors, ((0, 0), (0, num_anchors - drawn)), constant_values=length)
    keep = anchors < length
    return jnp.where(keep, anchors, 0).astype(jnp.int32), keep


def make_blocks(
    input_ids: jax.Array,
    loss_mask: jax.Array,
    anchors: jax.Array,
    keep: jax.Array,
    *,
    block_size: int,
    mask_token_id: int,
    shift_label: bool,
    packing: Packing | None = None,
) -> Blocks:
    """Cuts the blocks that start at the anchors.

    The first position of an unshifted block holds its anchor, which is known, so it predicts nothing and is left out
    of the M predictions; either way prediction m is the token `1 + m` after the anchor.

    Args:
        input_ids: int [B, S].
        loss_mask: [B, S], supervised tokens.
        anchors: int32 [B, N].
        keep: bool [B, N], False for an unused slot.
        block_size: K.
        mask_token_id: the id that stands for a token to be drafted.
        shift_label: whether block position k predicts `anchor + 1 + k` (M = K) or `anchor + k` (M = K - 1).
        packing: documents of packed rows; labels stop at the end of the anchor's document.
    Returns:
        `Blocks`.
    Source: NeMo AutoModel 0.7.0, `_create_noise_embed` and `_build_block_targets`.
    """
    length = input_ids.shape[1]
    offsets = jnp.arange(block_size, dtype=jnp.int32)
    predictions = jnp.arange(block_size if shift_label else block_size - 1, dtype=jnp.int32)

    anchor_ids = jnp.where(keep, _gather(input_ids, anchors), mask_token_id)
    noise_ids = jnp.where(offsets == 0, anchor_ids[..., None], mask_token_id)
    first = anchors if packing is None else _gather(packing.position_ids, anchors)

    label_index = anchors[..., None] + 1 + predictions
    inside = label_index < length
    if packing is not None:
        inside &= 1 + predictions <= _gather(packing.doc_remaining, anchors)[..., None]
    clamped = jnp.minimum(label_index, length - 1)
    supervised = _gather(loss_mask, clamped) > 0.5
    return Blocks(
        noise_ids=noise_ids.astype(jnp.int32),
        positions=first[..., None] + offsets,
        previous_ids=_gather(input_ids, jnp.minimum(label_index - 1, length - 1)),
        target_ids=_gather(input_ids, clamped),
        mask=keep[..., None] & inside & supervised,
    )


def document_ids(seq_lens: jax.Array, length: int) -> jax.Array:
    """The document each position of a packed row belongs to, int32 [B, length], from lengths [B, documents]."""
    ends = jnp.cumsum(seq_lens, axis=1)
    return jnp.sum(ends[:, None, :] <= jnp.arange(length)[None, :, None], axis=-1).astype(jnp.int32)


def position_weights(mask: jax.Array, *, gamma: float | None) -> jax.Array:
    """Loss weights that decay along the block.

    Args:
        mask: bool [..., M], supervised predictions.
        gamma: decay length in positions; None or a value <= 0 means no decay.
    Returns:
        float32 [..., M], `mask * exp(-m / gamma)`.
    Source: DFlash (arXiv:2602.06036), equation 4.
    """
    weights = mask.astype(jnp.float32)
    if gamma is None or gamma <= 0:
        return weights
    return weights * jnp.exp(-jnp.arange(mask.shape[-1], dtype=jnp.float32) / gamma)


def _gather(values: jax.Array, index: jax.Array) -> jax.Array:  # [B, S], [B, ...] -> [B, ...]
    return jax.vmap(lambda row, at: row[at])(values, index)
