"""Attention of the target: each token sees itself and what stands before it, in a row or behind a cache.

    keys of the cache      0 1 2 3 4 5 . .      S slots, those after the row's last position are stale
    queries at 4, 5              4 sees 0..4, 5 sees 0..5

An own kernel for a TPU (splash attention) or a GPU (cuDNN), which never holds scores [T, S], takes the place of
`causal_attention`'s body when there is one; today every platform runs the definition.
"""

import jax
import jax.numpy as jnp


def definition(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array) -> jax.Array:
    """Softmax attention in which several query heads share one key-value head.

    Args:
        q: [B, H, T, head_dim].
        k: [B, KV, S, head_dim], KV divides H.
        v: [B, KV, S, head_dim].
        mask: bool [B or 1, T, S], True where the query may look; each row needs one True.
    Returns:
        [B, H, T, head_dim] in the type of `q`; scores and softmax are float32.
    """
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    # Group and length merge into the rows of one plain product per key-value head.
    rows = q.reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = jnp.einsum("bkrd,bksd->bkrs", rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrs,bksd->bkrd", weights.reshape(batch, kv_heads, -1, k.shape[2]), v)
    return out.reshape(batch, heads, length, width)


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, *, documents: jax.Array | None = None) -> jax.Array:
    """Attention of whole rows.

    Args:
        q: [B, H, T, head_dim].
        k: [B, KV, T, head_dim], KV divides H.
        v: [B, KV, T, head_dim].
        documents: int32 [B, T], the document of each token of packed rows, which see nothing of other documents.
    Returns:
        [B, H, T, head_dim] in the type of `q`.
    """
    # By place in the row: the positions of packed documents start again and again.
    mask = jnp.tri(q.shape[2], dtype=bool)[None]
    if documents is not None:
        mask &= documents[:, :, None] == documents[:, None, :]
    return definition(q, k, v, mask=mask)
