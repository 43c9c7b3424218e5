"""The draft model: the DFlash backbone and, when its config asks for one, the Domino head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.draft.attention import block_attention
from domino_jax.draft.head import DominoHead
from domino_jax.layers import AttentionProjections, Dense, RMSNorm, Rotary, SwiGLU, rotary
from domino_jax.model_config import DraftConfig
from domino_jax.sharding import constrain

KeysValues = tuple[jax.Array, jax.Array]


class DraftLayer(nn.Module):
    """Pre-norm block attention over `[context | own block]` and SwiGLU, each added to its input."""

    cfg: DraftConfig

    def setup(self) -> None:
        """Creates the layer's four parts."""
        self.input_layernorm = RMSNorm(self.cfg.rms_norm_eps)
        self.self_attn = AttentionProjections(self.cfg)
        self.post_attention_layernorm = RMSNorm(self.cfg.rms_norm_eps)
        self.mlp = SwiGLU(self.cfg)

    def __call__(self, x: jax.Array, context: KeysValues, tables: Rotary, mask: jax.Array) -> jax.Array:
        """Runs the blocks, [B, N*K, D] -> [B, N*K, D]; `mask` is bool [B, N, S]."""
        normed = self.input_layernorm(x)
        own = self.self_attn.keys_values(normed, tables)
        heads = block_attention(self.self_attn.queries(normed, tables), context, own, mask=mask)
        x = x + self.self_attn.output(heads)
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), "batch", "length", None)

    def context_keys_values(self, context: jax.Array, tables: Rotary) -> KeysValues:
        """Keys and values of context states, [B, S, D] -> two [B, KV, S, head_dim]; the context is not normed here."""
        return self.self_attn.keys_values(context, tables)


class DraftModel(nn.Module):
    """A small non-causal stack that reads the target's states and fills whole blocks in one pass.

    Embedding and output head are the target's, so they are arguments of the callers, never parameters here.
    Source: DFlash (arXiv:2602.06036) and Domino (arXiv:2605.29707); parameter names are those of the checkpoints.
    """

    cfg: DraftConfig

    def setup(self) -> None:
        """Creates the projection of the target's states, the layers, the final norm and the head."""
        cfg = self.cfg
        self.fc = Dense(cfg.hidden_size, ("embed", "features"), cfg.dtype)
        self.hidden_norm = RMSNorm(cfg.rms_norm_eps)
        self.layers = [DraftLayer(cfg) for _ in range(cfg.num_hidden_layers)]
        self.norm = RMSNorm(cfg.rms_norm_eps)
        if cfg.projector_type == "domino":
            self.head = DominoHead(cfg)

    def __call__(
        self,
        features: jax.Array,
        context_positions: jax.Array,
        embeddings: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
    ) -> jax.Array:
        """Hidden states of all blocks.

        Args:
            features: [B, S, C*D], states of the captured target layers.
            context_positions: int32 [B, S].
            embeddings: [B, N, K, D], the noise blocks in the target's embedding.
            positions: int32 [B, N, K].
            mask: bool [B, N, S], the context each block sees.
        Returns:
            [B, N, K, D] after the final norm, in the compute dtype.
        """
        return self.block_states(self.context(features, context_positions), embeddings, positions, mask)

    def context(self, features: jax.Array, positions: jax.Array) -> tuple[KeysValues, ...]:
        """Each layer's keys and values of the context, from features [B, S, C*D] at positions [B, S]."""
        states = self.hidden_norm(self.fc(features))
        tables = rotary(positions, self.cfg)
        return tuple(layer.context_keys_values(states, tables) for layer in self.layers)

    def block_states(
        self, context: tuple[KeysValues, ...], embeddings: jax.Array, positions: jax.Array, mask: jax.Array
    ) -> jax.Array:
        """Like the whole call, from the context's keys and values, which decoding keeps between cycles."""
        batch, blocks, size, width = embeddings.shape
        tables = rotary(positions.reshape(batch, blocks * size), self.cfg)
        x = embeddings.reshape(batch, blocks * size, width).astype(self.cfg.dtype)
        for layer, keys_values in zip(self.layers, context, strict=True):
            x = layer(x, keys_values, tables, mask)
        return self.norm(x).reshape(batch, blocks, size, width)

    def prediction_states(self, hidden: jax.Array) -> jax.Array:
        """The positions that predict, [B, N, K, D] -> [B, N, M, D]: all with `shift_label`, else all but the anchor."""
        return hidden if self.cfg.shift_label else hidden[:, :, 1:]


def init_variables(model: DraftModel, key: jax.Array) -> dict:
    """Boxed variables of a draft, with the logical axes of each parameter (see `sharding.parameter_shardings`).

    Args:
        model: the draft.
        key: a PRNG key.
    """
    cfg = model.cfg

    def touch_all(module: DraftModel) -> None:
        states = jnp.zeros((1, 1, len(cfg.target_layer_ids) * cfg.hidden_size), cfg.dtype)
        block = jnp.zeros((1, 1, cfg.block_size, cfg.hidden_size), cfg.dtype)
        positions = jnp.zeros((1, 1, cfg.block_size), jnp.int32)
        hidden = module(states, jnp.zeros((1, 1), jnp.int32), block, positions, jnp.ones((1, 1, 1), bool))
        if cfg.projector_type == "domino":
            predictions = module.prediction_states(hidden)
            module.head(predictions, jnp.zeros_like(predictions))

    return nn.init(touch_all, model)(key)
