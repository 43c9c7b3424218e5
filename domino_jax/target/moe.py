"""The sparse feed-forward layer of Qwen3 MoE, in which no token is dropped.

Experts of a fixed capacity drop tokens where many want the same one: the target would not be the
model that was published any more. So rows, one copy of a token for each of its k experts, are
sorted by expert, and a ragged product takes as many as each has:

    tokens [M, D]     t0 -> experts 2, 0      t1 -> experts 0, 1      t2 -> experts 2, 1
    rows [M*k, D]     t0 t1 | t1 t2 | t0 t2   of the experts 0 | 1 | 2, `runs` = 2, 2, 2
    back in order     t0 t0   t1 t1   t2 t2   summed by weight -> [M, D]
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.config.model import DecoderConfig
from domino_jax.layers.dense import Dense
from domino_jax.sharding import constrain, logical_axes

# Rows [M*k, in] times one weight [out, in] per run of rows: weights keep the layout of the
# checkpoints, which `ragged_dot` would want as [in, out].
_ROWS_BY_EXPERT = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
)


class Routes(NamedTuple):
    """Where each token goes: `experts` int32 [M, k], their shares `weights` float32 [M, k]."""

    experts: jax.Array
    weights: jax.Array


def routes(logits: jax.Array, *, count: int, normalise: bool) -> Routes:
    """The experts of each token and their shares.

    Args:
        logits: [M, E], the router's scores.
        count: experts per token, k.
        normalise: divide the chosen probabilities by their sum (`norm_topk_prob`).
    Returns:
        `Routes`, most probable first; the probabilities are a float32 softmax over all experts.
    Source: Qwen3 (arXiv:2505.09388), as transformers computes it.
    """
    # In float32, as transformers has it: rounded to bfloat16, close shares tie and choose others.
    shares = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(shares, count)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routes(experts.astype(jnp.int32), weights)


class Experts(nn.Module):
    """The SwiGLU experts of one layer, stacked.

    `gate_proj` and `up_proj` are [E, F, D], `down_proj` is [E, D, F].
    """

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, to: Routes) -> jax.Array:  # [M, D] -> [M, D]
        """Sends each token through its experts and sums what they return by weight, in float32."""
        cfg = self.cfg
        count = cfg.num_experts
        wide = cfg.moe_intermediate_size
        narrow = cfg.hidden_size
        # Sorted by expert, the rows of one expert are a run: one product per run, whatever its
        # length.
        chosen = to.experts.reshape(-1)
        order = jnp.argsort(chosen)
        runs = jnp.bincount(chosen, length=count).astype(jnp.int32)
        # `order` counts pairs of a token and an expert, k for each token.
        rows = jnp.take(x.astype(cfg.dtype), order // cfg.num_experts_per_tok, axis=0)  # [M*k, D]
        into, back = (count, wide, narrow), (count, narrow, wide)
        gate = self._product(rows, "gate_proj", into, ("experts", "mlp", "embed"), runs)
        up = self._product(rows, "up_proj", into, ("experts", "mlp", "embed"), runs)
        hidden = constrain(nn.silu(gate) * up, None, "mlp")
        out = self._product(hidden, "down_proj", back, ("experts", "embed", "mlp"), runs)
        # The inverse of a permutation is its argsort.
        out = jnp.take(out, jnp.argsort(order), axis=0).reshape(*to.experts.shape, narrow)
        return jnp.einsum("mk,mkd->md", to.weights, out.astype(jnp.float32)).astype(x.dtype)

    def _product(
        self,
        rows: jax.Array,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        runs: jax.Array,
    ) -> jax.Array:
        init = logical_axes(nn.initializers.normal(stddev=0.02), *axes)
        weight = self.param(name, init, shape, jnp.float32).astype(self.cfg.dtype)
        return jax.lax.ragged_dot_general(rows, weight, runs, _ROWS_BY_EXPERT)


class SparseMLP(nn.Module):
    """Router (`gate`) and `experts` in the place of a dense SwiGLU."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D] -> [B, T, D]
        """Applies the chosen experts to every token."""
        cfg = self.cfg
        tokens = x.reshape(-1, x.shape[-1])
        scores = Dense(cfg.num_experts, ("experts", "embed"), cfg.dtype, name="gate")(tokens)
        to = routes(scores, count=cfg.num_experts_per_tok, normalise=cfg.norm_topk_prob)
        return Experts(cfg, name="experts")(tokens, to).reshape(x.shape)
