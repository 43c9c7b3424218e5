"""The draft model: the DFlash backbone, which fills every block in one pass, and a head or none.

The context's keys and values are made apart from the blocks, so that decoding can keep them between
its cycles:

    features [B, S, C*D] -> fc -> hidden_norm -> [B, S, D] -> each layer's keys and values
                                                                  | seen up to each anchor
    blocks [B, N, K, D] -> [B, N*K, D] -> layer 1 -> ... -> layer n -> norm -> [B, N, K, D]
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.base.scopes import BACKBONE, BLOCK_ATTENTION, CONTEXT
from domino_jax.config.model import SLIDING_ATTENTION, DraftConfig
from domino_jax.draft.head import HEAD_MODULES, Head
from domino_jax.kernels.block_attention import RESULT, block_attention
from domino_jax.kernels.kv_cache import Cache, empty_cache
from domino_jax.kernels.operands import ContextSpan
from domino_jax.layers.attention import AttentionProjections
from domino_jax.layers.dense import Dense, SwiGLU
from domino_jax.layers.norm import RMSNorm
from domino_jax.layers.rotary import Rotary, rotary
from domino_jax.sharding import constrain

# What a layer that recomputes keeps for its backward pass: products, which are expensive to repeat,
# and what attention gives, which is a loop or a kernel and so no product to the first policy.
KEPT = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(RESULT)
)


class DraftLayer(nn.Module):
    """Pre-norm block attention over `[context | own block]` and SwiGLU, each added to its input.

    Attributes:
        cfg: the draft.
        causal: whether a position sees only its own and earlier positions of its block.
    """

    cfg: DraftConfig
    causal: bool = False

    def setup(self) -> None:
        """Creates the layer's four parts."""
        self.input_layernorm = RMSNorm(self.cfg.rms_norm_eps)
        self.self_attn = AttentionProjections(self.cfg)
        self.post_attention_layernorm = RMSNorm(self.cfg.rms_norm_eps)
        self.mlp = SwiGLU(self.cfg)

    def __call__(
        self, x: jax.Array, context: Cache, tables: Rotary, span: ContextSpan
    ) -> jax.Array:
        """Runs the blocks, [B, N*K, D] -> [B, N*K, D]; `span` is the context that they see."""
        normed = self.input_layernorm(x)
        own = self.self_attn.keys_values(normed, tables)
        queries = self.self_attn.queries(normed, tables)
        with jax.named_scope(BLOCK_ATTENTION):
            heads = block_attention(queries, context, own, span=span, causal=self.causal)
        x = x + self.self_attn.output(heads)
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), "batch", "length", None)


def _run(layer: DraftLayer, *arguments: Any) -> jax.Array:
    return layer(*arguments)


def _run_backward(vjp: Any, cotangent: jax.Array) -> Any:
    gradients = vjp(cotangent)
    # The spans are integers: their gradients are of float0, which no operation takes.
    of_floats = [x for x in jax.tree.leaves(gradients) if x.dtype != jax.dtypes.float0]
    ordered = iter(jax.lax.optimization_barrier(of_floats))
    return jax.tree.map(lambda x: x if x.dtype == jax.dtypes.float0 else next(ordered), gradients)


# A layer whose gradients are there before those of the layer below are begun: the barrier of
# `_run_backward`. A compiler that sees memory to spare would leave the products for the weights to
# the end, and keep all that they read until then.
_gradients_in_turn = nn.custom_vjp(
    _run, forward_fn=functools.partial(nn.vjp, _run), backward_fn=_run_backward
)


class DraftModel(nn.Module):
    """A small non-causal stack that reads the target's states and fills whole blocks in one pass.

    Embedding and output head are the target's, so they are arguments of the callers, never
    parameters here.

    Attributes:
        cfg: the draft.
        recompute: whether the backward pass recomputes what is no product (norms, rotations,
            gates, weights in the compute type) instead of keeping it, and gives the gradients of
            one layer after those of the other.
    Source: DFlash (arXiv:2602.06036) and Domino (arXiv:2605.29707); parameter names are those of
    the checkpoints.
    """

    cfg: DraftConfig
    recompute: bool = False

    def setup(self) -> None:
        """Creates the projection of target states, the layers, the final norm and the head."""
        cfg = self.cfg
        self.fc = Dense(cfg.hidden_size, ("embed", "features"), cfg.dtype)
        self.hidden_norm = RMSNorm(cfg.rms_norm_eps)
        causal_kind = SLIDING_ATTENTION if cfg.sliding_in_block == "causal" else None
        layer = nn.remat(DraftLayer, policy=KEPT) if self.recompute else DraftLayer
        self.layers = [layer(cfg, causal=kind == causal_kind) for kind in cfg.attention_types]
        self.norm = RMSNorm(cfg.rms_norm_eps)
        if cfg.head is not None:
            self.head: Head = HEAD_MODULES[type(cfg.head)](cfg, cfg.head)

    def __call__(
        self,
        features: jax.Array,
        context_positions: jax.Array,
        embeddings: jax.Array,
        positions: jax.Array,
        spans: Mapping[str, ContextSpan],
    ) -> jax.Array:
        """Hidden states of all blocks.

        Args:
            features: [B, S, C*D], states of the captured target layers.
            context_positions: int32 [B, S].
            embeddings: [B, N, K, D], the noise blocks in the target's embedding.
            positions: int32 [B, N, K].
            spans: the context that blocks see, by type of attention (`layer_spans`).
        Returns:
            [B, N, K, D] after the final norm, in the compute dtype.
        """
        return self.block_states(
            self.context(features, context_positions), embeddings, positions, spans
        )

    @jax.named_scope(CONTEXT)
    def context(self, features: jax.Array, positions: jax.Array) -> tuple[Cache, ...]:
        """Each layer's keys and values of the context; arguments as in the whole call."""
        # Normed once for all layers: their own input norms are for the blocks alone.
        states = self.hidden_norm(self.fc(features))
        tables = rotary(positions, self.cfg)
        return tuple(Cache(*layer.self_attn.keys_values(states, tables)) for layer in self.layers)

    @jax.named_scope(BACKBONE)
    def block_states(
        self,
        context: tuple[Cache, ...],
        embeddings: jax.Array,
        positions: jax.Array,
        spans: Mapping[str, ContextSpan],
    ) -> jax.Array:
        """Like the whole call, from the keys and values that decoding keeps between cycles."""
        batch, blocks, size, width = embeddings.shape
        # All blocks are one sequence here: only attention needs to know where a block ends.
        tables = rotary(positions.reshape(batch, blocks * size), self.cfg)
        x = embeddings.reshape(batch, blocks * size, width) * self.cfg.input_embedding_scale
        x = x.astype(self.cfg.dtype)
        run = _gradients_in_turn if self.recompute else _run
        for layer, kind, keys_values in zip(
            self.layers, self.cfg.attention_types, context, strict=True
        ):
            x = run(layer, x, keys_values, tables, spans[kind])
        return self.norm(x).reshape(batch, blocks, size, width)

    def empty_cache(self, *, batch: int, cache_len: int) -> tuple[Cache, ...]:
        """A cache of zeros for the context of each layer, in the compute dtype."""
        return tuple(
            empty_cache(self.cfg, batch=batch, cache_len=cache_len)
            for _ in range(self.cfg.num_hidden_layers)
        )

    def prediction_states(self, hidden: jax.Array) -> jax.Array:
        """The positions that predict, [B, N, K, D] -> [B, N, M, D]; see `draft.blocks`."""
        return hidden if self.cfg.shift_label else hidden[:, :, 1:]

    def corrections(self, hidden: jax.Array, previous: jax.Array) -> jax.Array:
        """The head's factors of teacher-forced predictions, 0 for the pure prefix.

        Args:
            hidden: [..., M, D], states of the predictions.
            previous: [..., M, D], embeddings of the tokens just before them.
        Returns:
            [..., M, R].
        """
        # Not cut before the head: later predictions need what it remembers of these tokens.
        low_rank = self.head(hidden, previous)
        corrected = jnp.arange(hidden.shape[-2]) >= self.cfg.pure_draft_prefix_len
        return jnp.where(corrected[:, None], low_rank, 0)


def output_logits(cfg: DraftConfig, logits: jax.Array) -> jax.Array:
    """Scales and softly bounds the target head's product, where the config says so.

    Source: NeMo AutoModel 0.7.0, `Qwen3DFlashDraftModel.compute_logits`.
    """
    cap = cfg.final_logit_softcapping
    # Scaled before it is bounded, as in the reference: the cap holds for the result.
    if cfg.output_multiplier != 1.0:
        logits = logits * cfg.output_multiplier
    return logits if cap is None else cap * jnp.tanh(logits / cap)
