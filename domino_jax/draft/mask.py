"""Which keys a draft block sees: the rule over the context, and the dense mask that spells out all of it."""

import jax
import jax.numpy as jnp

from domino_jax.draft.blocks import document_ids


def context_mask(
    anchors: jax.Array, keep: jax.Array, *, context_len: int, seq_lens: jax.Array | None = None
) -> jax.Array:
    """Tells which context positions the queries of a block may attend to.

    Args:
        anchors: int32 [B, N], context position of each block's clean first token.
        keep: bool [B, N], False for an unused slot, which sees no context.
        context_len: S.
        seq_lens: int [B, documents] for packed rows; a block sees its own document only.
    Returns:
        bool [B, N, S], True where attention is allowed.
    Source: DFlash (arXiv:2602.06036), section 4.2.
    """
    # Strictly before: at inference the target's hidden state at the anchor does not exist yet.
    visible = (jnp.arange(context_len) < anchors[..., None]) & keep[..., None]
    if seq_lens is None:
        return visible
    documents = document_ids(seq_lens, context_len)
    return visible & (documents[:, None, :] == jnp.take_along_axis(documents, anchors, axis=1)[..., None])


def block_mask(
    anchors: jax.Array, keep: jax.Array, *, context_len: int, block_size: int, seq_lens: jax.Array | None = None
) -> jax.Array:
    """The whole mask over `[context | all blocks]`: the slow reference for `block_attention`.

    Args:
        anchors: int32 [B, N].
        keep: bool [B, N].
        context_len: S.
        block_size: K.
        seq_lens: int [B, documents] for packed rows.
    Returns:
        bool [B, N*K, S + N*K], True where attention is allowed. An unused slot still sees itself, so that no
        softmax row is empty.
    """
    batch, count = anchors.shape
    context = context_mask(anchors, keep, context_len=context_len, seq_lens=seq_lens)
    block = jnp.arange(count * block_size) // block_size
    own = jnp.broadcast_to(block[:, None] == block[None, :], (batch, count * block_size, count * block_size))
    return jnp.concatenate([jnp.repeat(context, block_size, axis=1), own], axis=-1)
