"""Which keys each draft query attends to: its span of the context.

A block sees all of itself, and of the context one span per query. With K = 2 and anchors 3 and 6:

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
