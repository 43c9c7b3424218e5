"""What a draft sees in training and lacks at inference spoils it; this says who sees what.

Two forms: a span of the context per query, which is all that the kernels need, and the dense mask
that spells out everything, their slow reference. With K = 2 and anchors 3 and 6:

                                 context             blocks' tokens
                                 0 1 2 3 4 5 6 7     0 0 1 1
    block 0, k = 0 and 1         x x x . . . . .     x x . .     span 0 <= j < 3
    block 1, k = 0 and 1         x x x x x x . .     . . x x     span 0 <= j < 6
    block 1, window 4, k = 0     . . . x x x . .     . . x x     span 3 <= j < 6
                       k = 1     . . . . x x . .     . . x x     span 4 <= j < 6
    an unused slot               . . . . . . . .     itself      span 0 <= j < 0
"""

import jax
import jax.numpy as jnp

from domino_jax.config.model import SLIDING_ATTENTION, DraftConfig
from domino_jax.kernels.operands import ContextSpan


def context_span(
    anchors: jax.Array,
    keep: jax.Array,
    *,
    seq_lens: jax.Array | None = None,
    block_size: int = 1,
    window: int | None = None,
) -> ContextSpan:
    """Tells which context positions the queries of a block may attend to.

    Args:
        anchors: int32 [B, N], context position of each block's clean first token.
        keep: bool [B, N], False for an unused slot, which sees no context.
        seq_lens: int [B, documents] for packed rows; a block sees its own document only.
        block_size: K; read with a window only.
        window: a query at `anchor + k` sees the context less than so many positions before it; None
            for all of it.
    Returns:
        `ContextSpan`.
    Source: DFlash (arXiv:2602.06036), section 4.2; NeMo AutoModel 0.7.0, `create_dflash_sdpa_mask`.
    """
    anchors = jnp.asarray(anchors, jnp.int32)
    # Strictly before: at inference the target's hidden state at the anchor does not exist yet.
    end = jnp.where(keep, anchors, 0)[..., None]
    first = jnp.zeros_like(end)
    if seq_lens is not None:
        lengths = jnp.asarray(seq_lens, jnp.int32)[:, None, :]
        # The context's documents lie one after the other: those that end before the anchor's add up
        # to its first position.
        done = jnp.cumsum(lengths, axis=-1) <= anchors[..., None]
        first = jnp.sum(jnp.where(done, lengths, 0), axis=-1, keepdims=True)
    if window is not None:
        # The lower bound alone differs within a block: the upper one is the anchor for all of it.
        queries = anchors[..., None] + jnp.arange(block_size, dtype=jnp.int32)  # [B, N, K]
        first = jnp.maximum(first, queries - (window - 1))
    return ContextSpan(first, end)


def layer_spans(
    cfg: DraftConfig, anchors: jax.Array, keep: jax.Array, *, seq_lens: jax.Array | None = None
) -> dict[str, ContextSpan]:
    """The `context_span` of each type of attention that the draft's layers have.

    Layers of one type share theirs; the names are those of `layer_types`.
    """
    return {
        kind: context_span(
            anchors,
            keep,
            seq_lens=seq_lens,
            block_size=cfg.block_size,
            window=cfg.sliding_window if kind == SLIDING_ATTENTION else None,
        )
        # Sorted: a set has another order in each process, and with it the traced program.
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
        window: as in `context_span`.
        causal: whether a query sees only its own and earlier positions of its block.
    Returns:
        bool [B, N*K, S + N*K], True where attention is allowed. An unused slot still sees itself,
        so that no softmax is empty.
    """
    batch, count = anchors.shape
    size = count * block_size
    span = context_span(anchors, keep, seq_lens=seq_lens, block_size=block_size, window=window)
    places = jnp.arange(context_len)
    context = (span.first[..., None] <= places) & (places < span.end[..., None])  # [B, N, Q, S]
    context = jnp.broadcast_to(context, (batch, count, block_size, context_len))
    context = context.reshape(batch, size, context_len)
    position = jnp.arange(size)
    own = position[:, None] // block_size == position[None, :] // block_size
    if causal:
        own &= position[None, :] <= position[:, None]
    own = jnp.broadcast_to(own, (batch, size, size))
    return jnp.concatenate([context, own], axis=-1)
