"""The projections around attention, the same in target and draft; what attends is theirs.

Heads go first, so that each head's positions lie together:

    x [B, T, D] -> queries [B, H, T, head_dim], keys and values [B, KV, T, head_dim] -> [B, T, D]
"""

import flax.linen as nn
import jax

from domino_jax.config.model import DecoderShape
from domino_jax.layers.dense import Dense
from domino_jax.layers.norm import RMSNorm
from domino_jax.layers.rotary import Rotary, rotate


class AttentionProjections(nn.Module):
    """The weights of grouped attention: q, k, v, o; by family, biases of q, k, v, norms of q, k."""

    cfg: DecoderShape
    bias: bool = False

    def setup(self) -> None:
        """Creates the four projections and the two norms."""
        cfg = self.cfg
        query_width = cfg.num_attention_heads * cfg.head_dim
        key_width = cfg.num_key_value_heads * cfg.head_dim
        self.q_proj = Dense(query_width, ("heads", "embed"), cfg.dtype, self.bias)
        self.k_proj = Dense(key_width, ("kv_heads", "embed"), cfg.dtype, self.bias)
        self.v_proj = Dense(key_width, ("kv_heads", "embed"), cfg.dtype, self.bias)
        # Never a bias: Qwen2 has biases of q, k and v alone.
        self.o_proj = Dense(cfg.hidden_size, ("embed", "heads"), cfg.dtype)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.rms_norm_eps)
            self.k_norm = RMSNorm(cfg.rms_norm_eps)

    def queries(self, x: jax.Array, tables: Rotary) -> jax.Array:
        """Rotated queries, [B, T, D] -> [B, H, T, head_dim]."""
        q = self._heads(self.q_proj(x))
        if self.cfg.qk_norm:
            q = self.q_norm(q)
        return rotate(q.swapaxes(1, 2), tables)

    def keys_values(self, x: jax.Array, tables: Rotary) -> tuple[jax.Array, jax.Array]:
        """Rotated keys and values, [B, T, D] -> two [B, KV, T, head_dim]."""
        k = self._heads(self.k_proj(x))
        if self.cfg.qk_norm:
            k = self.k_norm(k)
        k = rotate(k.swapaxes(1, 2), tables)
        v = self._heads(self.v_proj(x)).swapaxes(1, 2)
        return k, v

    def output(self, heads: jax.Array) -> jax.Array:
        """Joins the heads, [B, H, T, head_dim] -> [B, T, D]."""
        batch, _, length, _ = heads.shape
        return self.o_proj(heads.swapaxes(1, 2).reshape(batch, length, -1))

    # [B, T, heads * head_dim] -> [B, T, heads, head_dim]
    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.cfg.head_dim)
