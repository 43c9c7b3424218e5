"""Causal attention of the target: a token sees itself and what stands before it.

    keys of the cache      0 1 2 3 4 5 . .     S slots; those after a row's last position are stale
    queries at 4, 5        4 sees 0..4, 5 sees 0..5

On an accelerator the scores never exist: JAX's splash attention on a TPU, cuDNN's on a GPU that has
it. Elsewhere the definition runs over tiles of queries. The target is frozen: none of them needs a
gradient.
"""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

from domino_jax.sharding import split_over_devices

PORTABLE, CUDNN = "portable", "cudnn"
LANES, TILE = 128, 512


def definition(q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array) -> jax.Array:
    """Softmax attention in which several query heads share one key-value head.

    Args:
        q: [B, H, T, head_dim].
        k: [B, KV, S, head_dim], KV divides H.
        v: [B, KV, S, head_dim].
        mask: bool [B or 1, T, S], True where the query may look; each query needs one True.
    Returns:
        [B, H, T, head_dim] in the type of `q`; scores and softmax are float32.
    """
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    # Group and length merge into one axis, so that each key-value head has one plain product.
    queries = q.reshape(batch, kv_heads, heads // kv_heads * length, width)
    scores = jnp.einsum("bkrd,bksd->bkrs", queries, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, -1) * width**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkrs,bksd->bkrd", weights.reshape(batch, kv_heads, -1, k.shape[2]), v)
    return out.reshape(batch, heads, length, width)


def causal_mask(queries: jax.Array, length: int, documents: jax.Array | None) -> jax.Array:
    """What the tokens at places `queries` [T] of a row see of its `length` keys.

    bool [B or 1, T, S]. By place in the row: the positions of packed documents restart.
    """
    mask = (queries[:, None] >= jnp.arange(length))[None]
    if documents is None:
        return mask
    return mask & (documents[:, queries, None] == documents[:, None, :])


def by_query_tiles(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents: jax.Array | None = None,
    *,
    tile: int = TILE,
) -> jax.Array:
    """The definition for some queries at a time: scores [tile, S] instead of [T, S]."""
    batch, heads, length, width = q.shape
    if length <= tile:
        return definition(q, k, v, mask=causal_mask(jnp.arange(length), length, documents))
    count = -(-length // tile)
    tiles = jnp.pad(q, ((0, 0), (0, 0), (0, count * tile - length), (0, 0)))
    tiles = jnp.moveaxis(tiles.reshape(batch, heads, count, tile, width), 2, 0)

    def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, at = item
        return definition(queries, k, v, mask=causal_mask(at, length, documents))

    # Queries that fill up the last tile take the place of the last token, so that they see a key.
    places = jnp.minimum(jnp.arange(count * tile), length - 1).reshape(count, tile)
    out = jnp.moveaxis(jax.lax.map(one, (tiles, places)), 0, 2)
    return out.reshape(batch, heads, count * tile, width)[:, :, :length]


def on_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    documents: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """JAX's splash attention, which skips what lies above the diagonal."""
    batch, heads, length, width = q.shape
    kv_heads = k.shape[1]
    groups = heads // kv_heads
    tile = min(TILE, -(-length // LANES) * LANES)
    # Keys that fill up stand after all queries that are kept, which do not see them. The kernel
    # does not scale its scores, so the queries are scaled.
    more = -length % tile
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) for x in (q * width**-0.5, k, v))
    of_head = splash_masks.CausalMask((length + more,) * 2)
    mask = splash_masks.MultiHeadMask([of_head] * groups)
    sizes = splash.BlockSizes(block_q=tile, block_kv=tile)
    attend: Any = splash.make_splash_mqa_single_device(mask, block_sizes=sizes, interpret=interpret)
    segments = None
    if documents is not None:
        # No document has this number, so what fills up sees and is seen by itself alone.
        documents = jnp.pad(documents, ((0, 0), (0, more)), constant_values=-1)
        segments = splash.SegmentIds(documents, documents)
    by_head = jax.vmap(attend, in_axes=(0, 0, 0, None))
    by_row = jax.vmap(by_head, in_axes=(0, 0, 0, None if segments is None else 0))
    # The command sets the precision of all products to "highest", for float32. Mosaic refuses that
    # of bfloat16 operands ("Bad lhs type").
    precision: Any = contextlib.nullcontext()
    if q.dtype != jnp.float32:
        precision = jax.default_matmul_precision("default")
    with precision:
        out = by_row(q.reshape(batch, kv_heads, groups, -1, width), k, v, segments)
    return out.reshape(batch, heads, -1, width)[:, :, :length].astype(v.dtype)


def by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """cuDNN's attention; bfloat16 or float16 on an NVIDIA GPU only, and no documents."""
    # Positions before heads, as that function takes them.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return out.swapaxes(1, 2)


def implementation_for(platform: str, *, dtype: str, head_dim: int, packed: bool) -> str:
    """The implementation of `causal_attention` for devices of a platform, as jax names it.

    cuDNN cannot be traced for other platforms, so it is never a branch of a program: it is named
    here, once. It takes no `packed` rows of several documents.
    """
    # Widths that JAX lets cuDNN take on every GPU; those up to 256 need a Hopper or a later one.
    fits = head_dim <= 128 and head_dim % 8 == 0
    on_gpu = platform in ("gpu", "cuda")
    if on_gpu and fits and dtype == "bfloat16" and not packed:
        return CUDNN
    return PORTABLE


# Positions stay whole whatever the layout says of "length": a query sees all before it.
_HEADS = jax.P("batch", "kv_heads", None, None)
_DOCUMENTS = jax.P("batch", None)


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    documents: jax.Array | None = None,
    implementation: str = PORTABLE,
) -> jax.Array:
    """Attention of whole rows.

    Args:
        q: [B, H, T, head_dim].
        k: [B, KV, T, head_dim], KV divides H.
        v: [B, KV, T, head_dim].
        documents: int32 [B, T], the document of each token of packed rows, which see nothing of
            other documents.
        implementation: of `implementation_for`.
    Returns:
        [B, H, T, head_dim] in the type of `q`.
    Raises:
        ValueError: an unknown form, or cuDNN's with documents.
    """
    if implementation not in (PORTABLE, CUDNN):
        raise ValueError(f"form must be {PORTABLE} or {CUDNN}, found {implementation!r}")
    if implementation == CUDNN and documents is not None:
        raise ValueError("cudnn attends over whole rows: packed rows need the portable form")
    # Heads that share keys stay on the device that has the keys.
    by_kv_head = q.reshape(*k.shape[:2], -1, q.shape[-1])
    # Axes are named array by array, so documents that are not there are left out, not None.
    arrays: tuple[jax.Array, ...] = by_kv_head, k, v
    axes: tuple[jax.P, ...] = _HEADS, _HEADS, _HEADS
    if documents is not None:
        arrays, axes = (*arrays, documents), (*axes, _DOCUMENTS)
    run = split_over_devices(
        functools.partial(_of_device, implementation=implementation), inputs=axes, outputs=_HEADS
    )
    return run(*arrays).reshape(q.shape)


def _of_device(
    q: jax.Array, k: jax.Array, v: jax.Array, *documents: jax.Array, implementation: str
) -> jax.Array:
    """Attention of the rows and key heads of one device; `q` is [B, KV, H / KV * T, head_dim]."""
    batch, _, length, width = k.shape
    heads = q.reshape(batch, -1, length, width)
    if implementation == CUDNN:
        return by_cudnn(heads, k, v).reshape(q.shape)
    out = jax.lax.platform_dependent(heads, k, v, *documents, tpu=on_tpu, default=by_query_tiles)
    return out.reshape(q.shape)
