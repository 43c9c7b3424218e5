"""The frozen target: a Llama- or Qwen-style decoder.

A draft reads the target's states after a few of its layers, in the same compiled program that
trains the draft or verifies its tokens. So the target is a Linen module here, whose one pass serves
both: over whole rows in training, over a run of tokens behind a cache in decoding.

    tokens [B, T] -> embedding -> layer 0 -> layer 1 -> ... -> layer L-1 -> norm -> hidden [B, T, D]
    features [B, T, C*D]          the outputs of the C captured layers, joined; that of layer L-1
                                  after the norm
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.config.model import DecoderConfig
from domino_jax.kernels.causal_attention import PORTABLE, causal_attention
from domino_jax.kernels.kv_cache import Cache, cached_attention, empty_cache
from domino_jax.layers.attention import AttentionProjections
from domino_jax.layers.dense import SwiGLU
from domino_jax.layers.norm import RMSNorm
from domino_jax.layers.rotary import Rotary, rotary
from domino_jax.sharding import constrain, logical_axes
from domino_jax.target.moe import SparseMLP

# One `Cache` per layer, or, for a scanned target, one whose arrays have the layers in front:
# [L, B, KV, S, head_dim].
LayerCaches = tuple[Cache, ...] | Cache


class TargetOutput(NamedTuple):
    """What one pass of the target returns.

    `hidden` [B, T, D] is after the final norm, `features` [B, T, C*D] joins the outputs of the
    captured layers, the last layer's being `hidden` (as in Hugging Face's `hidden_states`), `cache`
    is the updated one, or None.
    """

    hidden: jax.Array
    features: jax.Array
    cache: LayerCaches | None


class _Place(NamedTuple):
    """Where a pass's tokens lie: the first position of each row, and the document of each token."""

    start: jax.Array  # int32 [B], which a cache needs
    documents: jax.Array | None = None  # int32 [B, T], of packed rows


class DecoderLayer(nn.Module):
    """Pre-norm causal attention and SwiGLU (or a mixture of them), each added to its input."""

    cfg: DecoderConfig
    attention: str = PORTABLE

    @nn.compact
    def __call__(
        self, x: jax.Array, tables: Rotary, at: _Place, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [B, T, D] -> [B, T, D]
        """Runs one layer over whole rows or, with a cache, over a run of tokens behind it."""
        attention = AttentionProjections(self.cfg, self.cfg.attention_bias, name="self_attn")
        normed = RMSNorm(self.cfg.rms_norm_eps, name="input_layernorm")(x)
        queries = attention.queries(normed, tables)
        keys, values = attention.keys_values(normed, tables)
        if cache is None:
            heads = causal_attention(
                queries, keys, values, documents=at.documents, implementation=self.attention
            )
        else:
            heads, cache = cached_attention(queries, keys, values, cache, at.start)
        x = x + attention.output(heads)
        normed = RMSNorm(self.cfg.rms_norm_eps, name="post_attention_layernorm")(x)
        mlp = (SparseMLP if self.cfg.num_experts else SwiGLU)(self.cfg, name="mlp")
        return constrain(x + mlp(normed), "batch", "length", None), cache


class _CapturingLayer(nn.Module):
    """One step of the scan over layers, which puts the layer's output and cache in their places."""

    cfg: DecoderConfig
    attention: str = PORTABLE

    @nn.compact
    def __call__(
        self, carry: Any, item: tuple[jax.Array, jax.Array], tables: Rotary, at: _Place
    ) -> tuple[Any, None]:
        x, captured, caches = carry
        layer, slot = item
        cache = None
        if caches is not None:
            cache = jax.tree.map(
                lambda held: jax.lax.dynamic_index_in_dim(held, layer, keepdims=False), caches
            )
        x, cache = DecoderLayer(self.cfg, self.attention, name="layer")(x, tables, at, cache)
        if caches is not None:
            caches = jax.tree.map(
                lambda held, new: jax.lax.dynamic_update_index_in_dim(held, new, layer, 0),
                caches,
                cache,
            )
        # In the carry: an output of the scan would hold the states of all layers.
        captured = jax.lax.dynamic_update_index_in_dim(captured, x, slot, 0)
        return (x, captured, caches), None


class Target(nn.Module):
    """Decoder whose pass returns normed hidden states, captured layer outputs and the KV cache.

    Parameters carry Hugging Face's names: `embed_tokens`, `layers_{i}`, `norm` and, when the head
    is not tied, `lm_head` (read through `lm_head_weight`). With `scan_layers` the layers are
    stacked under `layers/layer`, which compiles fast. Verbs that only decode want them apart:
    slicing a stacked weight may copy it at every token.

    Attributes:
        cfg: shape of the decoder.
        capture: layers whose outputs are returned, 0-based (`capture=(1,)` is Hugging Face's
            `hidden_states[2]`).
        depth: how many layers run, the first ones, None for all of `cfg`; fewer give captured
            states only.
        scan_layers: run the layers under `nn.scan`.
        attention: name of an implementation (see `kernels.causal_attention.implementation_for`).
    """

    cfg: DecoderConfig
    capture: tuple[int, ...] = ()
    scan_layers: bool = False
    depth: int | None = None
    attention: str = PORTABLE

    @property
    def layers_run(self) -> int:
        """Layers that a pass goes through."""
        return self.cfg.num_hidden_layers if self.depth is None else self.depth

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        *,
        cache: LayerCaches | None = None,
        documents: jax.Array | None = None,
    ) -> TargetOutput:
        """Runs tokens through the decoder.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], consecutive in each row (in each document of a packed row),
                from 0 when not given. With a cache, new keys and values are written there; what
                lies at or after a row's first position is overwritten or masked, so that smaller
                positions rewind.
            cache: of `Target.empty_cache`, or of an earlier pass.
            documents: int32 [B, T], the document of each token of packed rows; a document's tokens
                are consecutive and see nothing of other documents. No cache then.
        Returns:
            `TargetOutput` in the compute dtype.
        Raises:
            ValueError: a cache together with `documents`, or a captured layer that does not run.
        """
        if not all(0 <= layer < self.layers_run for layer in self.capture):
            raise ValueError(
                f"cannot capture layers {list(self.capture)} of a target that runs "
                f"{self.layers_run}"
            )
        if cache is not None and documents is not None:
            raise ValueError("documents have no cache: packed rows are whole passes")
        if positions is None:
            positions = _positions(tokens, documents)
        embedding = self._vocabulary_table("embed_tokens")
        if not self.cfg.tie_word_embeddings:
            # Only declared: logits are for the caller, who rarely wants those of every position.
            self._vocabulary_table("lm_head")
        x = jnp.take(embedding, tokens, axis=0).astype(self.cfg.dtype)
        x = constrain(x, "batch", "length", None)
        tables = rotary(positions, self.cfg)
        at = _Place(positions[:, 0], documents)
        run: Any = self._scanned if self.scan_layers else self._unrolled
        x, captured, cache = run(x, tables, at, cache)
        hidden = RMSNorm(self.cfg.rms_norm_eps, name="norm")(x)
        # Of the whole target only: where it is cut, the last layer that runs is one of the middle.
        last = self.cfg.num_hidden_layers - 1
        captured = [
            hidden if layer == last else states
            for layer, states in zip(self.capture, captured, strict=True)
        ]
        none = jnp.zeros((*tokens.shape, 0), x.dtype)
        features = jnp.concatenate(captured, axis=-1) if captured else none
        return TargetOutput(hidden, features, cache)

    def empty_cache(self, *, batch: int, cache_len: int) -> LayerCaches:
        """A cache of zeros of all layers, in the compute dtype and the form that passes take."""
        layers = tuple(
            empty_cache(self.cfg, batch=batch, cache_len=cache_len) for _ in range(self.layers_run)
        )
        if not self.scan_layers:
            return layers
        return jax.tree.map(lambda *layer: jnp.stack(layer), *layers)

    def _vocabulary_table(self, name: str) -> jax.Array:  # [V, D]
        init = logical_axes(nn.initializers.normal(stddev=0.02), "vocab", "embed")
        shape = (self.cfg.vocab_size, self.cfg.hidden_size)
        return self.param(name, init, shape, jnp.float32)

    def _unrolled(
        self, x: jax.Array, tables: Rotary, at: _Place, cache: tuple[Cache, ...] | None
    ) -> tuple[jax.Array, list[jax.Array], tuple[Cache, ...] | None]:
        """The last layer's output, those of `capture` in its order, and the caches."""
        outputs: dict[int, jax.Array] = {}
        layers: list[Any] = []
        for index in range(self.layers_run):
            layer = DecoderLayer(self.cfg, self.attention, name=f"layers_{index}")
            x, layer_cache = layer(x, tables, at, cache[index] if cache else None)
            layers.append(layer_cache)
            if index in self.capture:
                outputs[index] = x
        return x, [outputs[index] for index in self.capture], tuple(layers) if cache else None

    def _scanned(
        self, x: jax.Array, tables: Rotary, at: _Place, cache: Cache | None
    ) -> tuple[jax.Array, list[jax.Array], Cache | None]:
        """As `_unrolled`, of stacked layers."""
        count = len(self.capture)
        # The last slot takes the outputs nobody asked for, so that no layer's state outlives the
        # next one.
        slot_of = {layer: slot for slot, layer in enumerate(self.capture)}
        slots = jnp.array([slot_of.get(layer, count) for layer in range(self.layers_run)])
        layers = nn.scan(
            _CapturingLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.layers_run,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.cfg, self.attention, name="layers")
        captured = jnp.zeros((count + 1, *x.shape), x.dtype)
        (x, captured, cache), _ = layers(
            (x, captured, cache), (jnp.arange(slots.size), slots), tables, at
        )
        return x, list(captured[:count]), cache


def _positions(tokens: jax.Array, documents: jax.Array | None) -> jax.Array:
    """Distance of each token from the first one of its row, or of its document; int32 [B, T]."""
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if documents is None:
        return places
    # The roll brings the end of a row before its first token, which begins a document in any case.
    begins = documents != jnp.roll(documents, 1, axis=1)
    first = jax.lax.cummax(jnp.where(begins.at[:, 0].set(True), places, 0), axis=1)
    return places - first


def lm_head_weight(params: Any) -> jax.Array:
    """The target's output head, [V, D]: its own matrix, or the embedding when tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]
