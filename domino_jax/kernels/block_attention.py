"""Attention of draft blocks over the context and themselves, without a mask or scores of all pairs.

    keys                  context 0 1 2 3 4 5 6 7 8 ...   own block
    a block at anchor 5   sees    x x x x x . . . . ...   x x x x
    a block at anchor 7   sees    x x x x x x x . . ...   x x x x     its own K tokens, no other's

Every query of a block sees one span of the context, `first <= j < end`, so no mask [N*K, S + N*K]
is ever needed. Tiles of plain products serve a CPU and a GPU (`block_attention_xla`), a kernel a
TPU (`block_attention_pallas_tpu`).

A merge of two softmaxes by their log-sum-exps is where gradients get lost. So the derivative is of
the whole operation: the forward pass keeps the merged output and its one log-sum-exp.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from domino_jax.kernels import block_attention_pallas_tpu as pallas_tpu
from domino_jax.kernels import block_attention_xla as xla
from domino_jax.kernels.block_attention_xla import (
    TILE,
    WHOLE_CONTEXT,
    WHOLE_CONTEXT_BACKWARD,
    TileSize,
)
from domino_jax.kernels.operands import LOWEST, ContextSpan, Operands, Saved
from domino_jax.sharding import split_over_devices


def definition(
    q: jax.Array,
    context: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    *,
    span: ContextSpan,
    causal: bool = False,
) -> jax.Array:
    """One softmax over the context and the query's own block; arguments as in `block_attention`."""
    batch, heads, queries, width = q.shape
    kv_heads, length = context[0].shape[1:3]
    blocks = span.end.shape[1]
    size = queries // blocks
    q = q.reshape(batch, kv_heads, heads // kv_heads, blocks, size, width)
    own_keys, own_values = (x.reshape(batch, kv_heads, blocks, size, width) for x in own)

    # Float32 scores whatever the operands: they are exponentiated, and their rounding with them.
    far = jnp.einsum("bkgnqd,bksd->bkgnqs", q, context[0], preferred_element_type=jnp.float32)
    near = jnp.einsum("bkgnqd,bkncd->bkgnqc", q, own_keys, preferred_element_type=jnp.float32)
    places = jnp.arange(length)
    seen = (span.first[..., None] <= places) & (places < span.end[..., None])  # [B, N, Q, S]
    far = jnp.where(seen[:, None, None], far * width**-0.5, LOWEST)
    seen_own = jnp.tri(size, dtype=bool) | (not causal)
    near = jnp.where(seen_own, near * width**-0.5, LOWEST)

    scores = jnp.concatenate([far, near], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkgnqs,bksd->bkgnqd", weights[..., :length], context[1])
    out += jnp.einsum("bkgnqc,bkncd->bkgnqd", weights[..., length:], own_values)
    return out.reshape(batch, heads, queries, width)


RESULT = "block_attention"  # the name of what it gives, for policies of `jax.checkpoint`

# Every device attends for its own rows and key heads, which need nothing of another's. The context
# stays whole: a query may see all of it.
_BY_BLOCK: Any = jax.P("batch", "kv_heads", None, None, None)
_BY_POSITION: Any = jax.P("batch", "kv_heads", None, None)
_BY_QUERY: Any = jax.P("batch", None, None)
_OPERAND_AXES = Operands(_BY_BLOCK, _BY_POSITION, _BY_POSITION, _BY_BLOCK, _BY_BLOCK)
_SPAN_AXES = ContextSpan(_BY_QUERY, _BY_QUERY)
_SAVED_AXES = Saved(_OPERAND_AXES, _SPAN_AXES, _BY_BLOCK, _BY_BLOCK)


@dataclass(frozen=True)
class Implementation:
    """One way to compute it.

    `forward(operands, span, causal=)` gives the output and its log-sum-exp float32, both in the
    axes of the queries; `backward(saved, cotangent, causal=)` gives the gradients of the operands.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., Operands]


def by_tiles(
    size: TileSize, *, backward: TileSize | None = None, transposed: bool
) -> Implementation:
    """Plain products over tiles; see `xla.backward` for `transposed`."""
    return Implementation(
        forward=functools.partial(xla.forward, size=size),
        backward=functools.partial(xla.backward, size=backward or size, transposed=transposed),
    )


IMPLEMENTATIONS = {
    "cpu": by_tiles(TILE, transposed=True),
    "tpu": Implementation(pallas_tpu.forward, pallas_tpu.backward),
    "default": by_tiles(WHOLE_CONTEXT, backward=WHOLE_CONTEXT_BACKWARD, transposed=False),
}


def _run(name: str, implementation: Implementation | None, *operands: Any, causal: bool) -> Any:
    """A form's forward or backward: the given one's, else that of the program's own platform."""
    if implementation is not None:
        return getattr(implementation, name)(*operands, causal=causal)
    # Not `jax.default_backend()`: it names the machine that traces, a CPU in a plan for a TPU.
    branches = {
        platform: functools.partial(getattr(implementation, name), causal=causal)
        for platform, implementation in IMPLEMENTATIONS.items()
    }
    return jax.lax.platform_dependent(*operands, **branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(
    operands: Operands, span: ContextSpan, causal: bool, implementation: Implementation | None
) -> jax.Array:
    out, _ = _forward(operands, span, causal, implementation)
    return out


def _forward(
    operands: Operands, span: ContextSpan, causal: bool, implementation: Implementation | None
) -> tuple[jax.Array, Saved]:
    run = split_over_devices(
        functools.partial(_run, "forward", implementation, causal=causal),
        inputs=(_OPERAND_AXES, _SPAN_AXES),
        outputs=(_BY_BLOCK, _BY_BLOCK),
    )
    out, log_sum = run(operands, span)
    # Both are named: were the log-sum-exp not kept, a layer that recomputes would attend again.
    out = checkpoint_name(out, RESULT)
    return out, Saved(operands, span, out, checkpoint_name(log_sum, RESULT))


def _backward(
    causal: bool, implementation: Implementation | None, saved: Saved, cotangent: jax.Array
) -> tuple[Operands, None]:
    run = split_over_devices(
        functools.partial(_run, "backward", implementation, causal=causal),
        inputs=(_SAVED_AXES, _BY_BLOCK),
        outputs=_OPERAND_AXES,
    )
    return run(saved, cotangent), None  # a span is integers, without a gradient


_attend.defvjp(_forward, _backward)


def block_attention(
    q: jax.Array,
    context: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    *,
    span: ContextSpan,
    causal: bool = False,
    implementation: Implementation | None = None,
) -> jax.Array:
    """One joint softmax over the context and the query's own block: scores of S + K, not S + N*K.

    Args:
        q: [B, H, N*K, head_dim].
        context: keys and values of the context, two [B, KV, S, head_dim], KV divides H.
        own: keys and values of the blocks, two [B, KV, N*K, head_dim].
        span: the context that each block, or each of its queries, sees.
        causal: whether a query sees only its own and earlier positions of its block.
        implementation: to take on every platform, for tests; each has its own when not given.
    Returns:
        [B, H, N*K, head_dim] in the type of `q`; scores and softmax are float32.
    Source: DFlash (arXiv:2602.06036), section 4.2.
    """
    batch, _, queries, width = q.shape
    kv_heads = context[0].shape[1]
    blocks = span.end.shape[1]
    out = _attend(_operands(q, context, own, span), span, causal, implementation)
    out = out.reshape(batch, kv_heads, blocks, -1, queries // blocks, width).swapaxes(2, 3)
    return out.reshape(q.shape)


def _operands(
    q: jax.Array,
    context: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    span: ContextSpan,
) -> Operands:
    batch, _, queries, width = q.shape
    kv_heads = context[0].shape[1]
    blocks = span.end.shape[1]

    # [B, KV * x, N * K, head_dim] -> [B, KV, N, x * K, head_dim]: the heads of a group beside their
    # block, since they see the same keys.
    def by_block(x: jax.Array) -> jax.Array:
        x = x.reshape(batch, kv_heads, -1, blocks, queries // blocks, width).swapaxes(2, 3)
        return x.reshape(batch, kv_heads, blocks, -1, width)

    return Operands(by_block(q), *context, *map(by_block, own))
