"""Which keys a draft block sees: the rule over the context, and the dense mask that spells out all of it."""

import jax
import jax.numpy as jnp

from domino_jax.draft.blocks import document_ids
from domino_jax.model_config import SLIDING_ATTENTION, DraftConfig


def context_mask(
    anchors: jax.Array,
    keep: jax.Array,
    *,
    context_len: int,
    seq_lens: jax.Array | None = None,
    block_size: int = 1,
    window: int | None = None,
) -> jax.Array:
    """Tells which context positions the queries of a block may attend to.

    Args:
        anchors: int32 [B, N], context position of each block's clean first token.
        keep: bool [B, N], False for an unused slot, which sees no context.
        context_len: S.
        seq_lens: int [B, documents] for packed rows; a block sees its own document only.
        block_size: K; read with a window only.
        window: a query at `anchor + k` sees the context less than so many positions before it; None for all of it.
    Returns:
        bool [B, N, Q, S], True where attention is allowed; Q is K with a window, and 1 without, where all queries of
        a block see the same.
    Source: DFlash (arXiv:2602.06036), section 4.2; NeMo AutoModel 0.7.0, `create_dflash_sdpa_mask`.
    """
    context = jnp.arange(context_len)
    # Strictly before: at inference the target's hidden state at the anchor does not exist yet.
    visible = (context < anchors[..., None]) & keep[..., None]  # [B, N, S]
    if seq_lens is not None:
        documents = document_ids(seq_lens, context_len)
        visible &= documents[:, None, :] == jnp.take_along_axis(documents, anchors, axis=1)[..., None]
    if window is None:
        return visible[:, :, None]
    queries = anchors[..., None] + jnp.arange(block_size)  # [B, N, K]
    return visible[:, :, None] & (queries[..., None] - context < window)


def layer_masks(
    cfg: DraftConfig,
    anchors: jax.Array,
    keep: jax.Array,
    *,
    context_len: int,
    seq_lens: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The `context_mask` of each type of attention that the draft's layers have, by its name in `layer_types`."""
    return {
        kind: context_mask(
            anchors,
            keep,
            context_len=context_len,
            seq_lens=seq_lens,
            block_size=cfg.block_size,
            window=cfg.sliding_window if kind == SLIDING_ATTENTION else None,
        )
        for kind in sorted(set(cfg.attention_types))
    }


def block_mask(
    anchors: jax.Array,
    keep: jax.Array,
    *,
    context_len: int,
    block_size: int,
    seq_lens: jax.Array | None = None,
    window: int | None = None,
    causal: bool = False,
) -> jax.Array:
    """The whole mask over `[context | all blocks]`: the slow reference for `block_attention`.

    Args:
        anchors: int32 [B, N].
        keep: bool [B, N].
        context_len: S.
        block_size: K.
        seq_lens: int [B, documents] for packed rows.
        window: as in `context_mask`.
        causal: whether a query sees only its own and earlier positions of its block.
    Returns:
        bool [B, N*K, S + N*K], True where attention is allowed. An unused slot still sees itself, so that no
        softmax row is empty.
    """
    batch, count = anchors.shape
    size = count * block_size
    context = context_mask(
        anchors, keep, context_len=context_len, seq_lens=seq_lens, block_size=block_size, window=window
    )
    context = jnp.broadcast_to(context, (batch, count, block_size, context_len)).reshape(batch, size, context_len)
    position = jnp.arange(size)
    own = position[:, None] // block_size == position[None, :] // block_size
    if causal:
        own &= position[None, :] <= position[:, None]
    return jnp.concatenate([context, jnp.broadcast_to(own, (batch, size, size))], axis=-1)
