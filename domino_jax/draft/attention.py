"""Attention of draft blocks over the context before their anchor and over themselves, without a dense mask."""

import jax
import jax.numpy as jnp


def block_attention(
    q: jax.Array,
    context: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    *,
    mask: jax.Array,
    causal: bool = False,
) -> jax.Array:
    """One joint softmax over the context and the query's own block: scores of width S + K, not S + N*K.

    Args:
        q: [B, H, N*K, head_dim].
        context: keys and values of the context, two [B, KV, S, head_dim].
        own: keys and values of the blocks, two [B, KV, N*K, head_dim].
        mask: bool [B, N, 1 or K, S], the context that each block or each of its queries sees (`context_mask`).
        causal: whether a query sees only its own and earlier positions of its block.
    Returns:
        [B, H, N*K, head_dim] in the type of `q`; scores and softmax are float32.
    Source: DFlash (arXiv:2602.06036), section 4.2; equal to `grouped_attention` under `block_mask`.
    """
    batch, heads, queries, width = q.shape
    blocks, length = mask.shape[1], mask.shape[3]
    kv_heads = context[0].shape[1]
    groups, size = heads // kv_heads, queries // blocks

    rows = q.reshape(batch, kv_heads, groups * queries, width)
    far = jnp.einsum("bkrd,bksd->bkrs", rows, context[0], preferred_element_type=jnp.float32)
    far = far.reshape(batch, kv_heads, groups, blocks, size, length) * width**-0.5
    far = jnp.where(mask[:, None, None], far, jnp.finfo(jnp.float32).min)

    per_block = q.reshape(batch, kv_heads, groups, blocks, size, width)
    own_keys, own_values = (x.reshape(batch, kv_heads, blocks, size, width) for x in own)
    near = jnp.einsum("bkgnqd,bkncd->bkgnqc", per_block, own_keys, preferred_element_type=jnp.float32) * width**-0.5
    if causal:
        near = jnp.where(jnp.tri(size, dtype=bool), near, jnp.finfo(jnp.float32).min)

    weights = jax.nn.softmax(jnp.concatenate([far, near], axis=-1), axis=-1).astype(q.dtype)
    far, near = weights[..., :length], weights[..., length:]
    out = jnp.einsum("bkrs,bksd->bkrd", far.reshape(batch, kv_heads, groups * queries, length), context[1])
    out = out.reshape(per_block.shape) + jnp.einsum("bkgnqc,bkncd->bkgnqd", near, own_values)
    return out.reshape(q.shape)
