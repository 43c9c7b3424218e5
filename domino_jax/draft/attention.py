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
    blocks, _, length = mask.shape[1:]
    kv_heads = context[0].shape[1]
    groups, size = heads // kv_heads, queries // blocks
    lowest = jnp.finfo(jnp.float32).min

    def by_block(x: jax.Array) -> jax.Array:  # [B, KV * x, N * K, head_dim] -> [B, KV, N, x * K, head_dim]
        x = x.reshape(batch, kv_heads, -1, blocks, size, width).swapaxes(2, 3)
        return x.reshape(batch, kv_heads, blocks, -1, width)

    # Whatever looks at the same keys lies together, so that every product is a plain one.
    rows, (own_keys, own_values) = by_block(q), map(by_block, own)
    flat = (batch, kv_heads, blocks * groups * size, -1)
    far = jnp.einsum("bkrd,bksd->bkrs", rows.reshape(flat), context[0], preferred_element_type=jnp.float32)
    far = far.reshape(batch, kv_heads, blocks, groups, size, length)
    far = jnp.where(mask[:, None, :, None], far * width**-0.5, lowest)
    near = jnp.einsum("bknrd,bkncd->bknrc", rows, own_keys, preferred_element_type=jnp.float32) * width**-0.5
    near = near.reshape(batch, kv_heads, blocks, groups, size, size)
    if causal:
        near = jnp.where(jnp.tri(size, dtype=bool), near, lowest)

    # Divided by the sum after the products: scores take up far more than what comes out.
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(far, axis=-1), jnp.max(near, axis=-1)))[..., None]
    far, near = jnp.exp(far - largest), jnp.exp(near - largest)
    sums = (jnp.sum(far, axis=-1) + jnp.sum(near, axis=-1)).reshape(*rows.shape[:-1], 1)
    far, near = far.astype(q.dtype), near.astype(q.dtype)
    out = jnp.einsum("bkrs,bksd->bkrd", far.reshape(flat), context[1], preferred_element_type=jnp.float32)
    near = near.reshape(*rows.shape[:-1], size)
    out = out.reshape(rows.shape) + jnp.einsum(
        "bknrc,bkncd->bknrd", near, own_values, preferred_element_type=jnp.float32
    )
    out = (out / sums).astype(q.dtype).reshape(batch, kv_heads, blocks, groups, size, width)
    return out.swapaxes(2, 3).reshape(q.shape)
