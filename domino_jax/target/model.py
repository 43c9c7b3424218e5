"""The frozen target: a Llama- or Qwen-style decoder that gives hidden states of chosen layers and a KV cache."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from domino_jax.layers import (
    AttentionProjections,
    RMSNorm,
    Rotary,
    SwiGLU,
    grouped_attention,
    project,
    rotary,
    write_rows,
)
from domino_jax.model_config import DecoderConfig
from domino_jax.sharding import constrain, logical_axes
from domino_jax.target.moe import SparseMLP


class Cache(NamedTuple):
    """Keys and values of one layer, both [B * KV, S, head_dim] (see `write_rows`); slot j holds position j."""

    keys: jax.Array
    values: jax.Array

    def write(self, keys: jax.Array, values: jax.Array, start: jax.Array) -> "Cache":
        """The cache with further positions, two [B, KV, T, head_dim], from `start` int32 [B] of each row on."""
        return Cache(write_rows(self.keys, keys, start), write_rows(self.values, values, start))

    def by_row(self, batch: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values, two [batch, KV, S, head_dim]."""
        keys, values = (x.reshape(batch, -1, *x.shape[1:]) for x in self)
        return keys, values


class TargetOutput(NamedTuple):
    """What one pass of the target returns.

    `hidden` [B, T, D] is after the final norm, `features` [B, T, C*D] joins the outputs of the
    captured layers, the last layer's being `hidden` (as in Hugging Face's `hidden_states`),
    `cache` is the updated one, a tuple with one `Cache` per layer, or None.
    """

    hidden: jax.Array
    features: jax.Array
    cache: tuple[Cache, ...] | None


class DecoderLayer(nn.Module):
    """Pre-norm causal attention and SwiGLU (or a mixture of them), each added to its input."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, tables: Rotary, mask: jax.Array, start: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:  # [B, T, D] -> [B, T, D]
        """Runs one layer; `mask` is bool [B or 1, T, T] or, with a cache of S slots, [B, T, S]."""
        attention = AttentionProjections(self.cfg, name="self_attn")
        normed = RMSNorm(self.cfg.rms_norm_eps, name="input_layernorm")(x)
        keys, values = attention.keys_values(normed, tables)
        if cache is not None:
            cache = cache.write(keys, values, start)
            keys, values = cache.by_row(x.shape[0])
        heads = grouped_attention(attention.queries(normed, tables), keys, values, mask=mask)
        x = x + attention.output(heads)
        normed = RMSNorm(self.cfg.rms_norm_eps, name="post_attention_layernorm")(x)
        mlp = (SparseMLP if self.cfg.num_experts else SwiGLU)(self.cfg, name="mlp")
        return constrain(x + mlp(normed), "batch", "length", None), cache


class _CapturingLayer(nn.Module):
    """One step of the scan over layers: the layer, and its output written to its slot of the captured states."""

    cfg: DecoderConfig

    @nn.compact
    def __call__(self, carry: Any, slot: jax.Array, tables: Rotary, mask: jax.Array) -> tuple[Any, None]:
        x, captured = carry
        start = jnp.zeros(x.shape[:1], jnp.int32)
        x, _ = DecoderLayer(self.cfg, name="layer")(x, tables, mask, start, None)
        return (x, jax.lax.dynamic_update_index_in_dim(captured, x, slot, 0)), None


class Target(nn.Module):
    """Decoder whose pass returns normed hidden states, captured layer outputs and the KV cache.

    Parameters carry Hugging Face's names: `embed_tokens`, `layers_{i}`, `norm` and, when the head is not tied,
    `lm_head` (read through `lm_head_weight`). With `scan_layers` the layers are stacked under `layers/layer`
    (see `stack_layers`): compilation is short, which suits whole-sequence passes. Cached decoding wants them apart,
    because slicing a stacked weight copies it, which doubles the time of a single-token step.

    Attributes:
        cfg: shape of the decoder.
        capture: layers whose outputs are returned, 0-based (`capture=(1,)` is Hugging Face's `hidden_states[2]`).
        depth: layers that run (see `first_layers`), None for all of `cfg`; fewer give captured states only.
        scan_layers: run the layers under `nn.scan`; no cache then.
    """

    cfg: DecoderConfig
    capture: tuple[int, ...] = ()
    scan_layers: bool = False
    depth: int | None = None

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
        cache: tuple[Cache, ...] | None = None,
        documents: jax.Array | None = None,
    ) -> TargetOutput:
        """Runs tokens through the decoder.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T], consecutive in each row (in each document of a packed row), from 0 when not
                given. With a cache they are also the slots the new keys and values are written to. Rewinding is
                implicit: a slot at or after a row's first position is overwritten or masked, so the caller just passes
                smaller positions.
            cache: from `empty_cache`, or of an earlier pass.
            documents: int32 [B, T], the document of each token of packed rows; a document's tokens are consecutive
                and see nothing of other documents. No cache then.
        Returns:
            `TargetOutput` in the compute dtype.
        Raises:
            ValueError: a cache together with `scan_layers` or with `documents`, or a captured layer
                that does not run.
        """
        cfg = self.cfg
        if not all(0 <= layer < self.layers_run for layer in self.capture):
            raise ValueError(f"cannot capture layers {list(self.capture)} of a target that runs {self.layers_run}")
        batch, length = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
            positions = positions if documents is None else _positions_in_documents(positions, documents)
        embedding = self.param(
            "embed_tokens",
            logical_axes(nn.initializers.normal(stddev=0.02), "vocab", "embed"),
            (cfg.vocab_size, cfg.hidden_size),
            jnp.float32,
        )
        if not cfg.tie_word_embeddings:
            self.param(
                "lm_head",
                logical_axes(nn.initializers.normal(stddev=0.02), "vocab", "embed"),
                (cfg.vocab_size, cfg.hidden_size),
                jnp.float32,
            )
        x = constrain(jnp.take(embedding, tokens, axis=0).astype(cfg.dtype), "batch", "length", None)
        tables = rotary(positions, cfg)
        if cache is not None and documents is not None:
            raise ValueError("documents have no cache: packed rows are whole passes")
        if cache is not None:
            mask = jnp.arange(cache[0].keys.shape[1]) <= positions[:, :, None]
        else:  # by place in the row: the positions of packed documents start again and again
            places = jnp.arange(length)
            mask = (places <= places[:, None])[None]
            mask = mask if documents is None else mask & (documents[:, :, None] == documents[:, None, :])
        if self.scan_layers:
            if cache is not None:
                raise ValueError("scan_layers has no cache: unstack the layers for decoding")
            x, captured = self._scanned(x, tables, mask)
        else:
            x, captured, cache = self._unrolled(x, tables, mask, positions[:, 0], cache)
        hidden = RMSNorm(cfg.rms_norm_eps, name="norm")(x)
        # Of the whole target only: where it is cut, the last layer that runs is one of the middle.
        last = cfg.num_hidden_layers - 1
        captured = [hidden if layer == last else states for layer, states in zip(self.capture, captured, strict=True)]
        none = jnp.zeros((batch, length, 0), x.dtype)
        features = jnp.concatenate(captured, axis=-1) if captured else none
        return TargetOutput(hidden, features, cache)

    def _unrolled(
        self, x: jax.Array, tables: Rotary, mask: jax.Array, start: jax.Array, cache: tuple[Cache, ...] | None
    ) -> tuple[jax.Array, list[jax.Array], tuple[Cache, ...] | None]:
        outputs: dict[int, jax.Array] = {}
        layers: list[Any] = []
        for index in range(self.layers_run):
            layer = DecoderLayer(self.cfg, name=f"layers_{index}")
            x, layer_cache = layer(x, tables, mask, start, cache[index] if cache else None)
            layers.append(layer_cache)
            if index in self.capture:
                outputs[index] = x
        return x, [outputs[index] for index in self.capture], tuple(layers) if cache else None

    def _scanned(self, x: jax.Array, tables: Rotary, mask: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        count = len(self.capture)
        # The last slot takes the outputs nobody asked for, so that no layer's state outlives the next one.
        slots = jnp.array([self.capture.index(i) if i in self.capture else count for i in range(self.layers_run)])
        layers = nn.scan(
            _CapturingLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.layers_run,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.cfg, name="layers")
        captured = jnp.zeros((count + 1, *x.shape), x.dtype)
        (x, captured), _ = layers((x, captured), slots, tables, mask)
        return x, list(captured[:count])


def _positions_in_documents(places: jax.Array, documents: jax.Array) -> jax.Array:
    """Distance of each token from the first one of its document, int32 [B, T], from its place in the row."""
    begins = documents != jnp.roll(documents, 1, axis=1)
    first = jax.lax.cummax(jnp.where(begins.at[:, 0].set(True), places, 0), axis=1)
    return places - first


def empty_cache(cfg: DecoderConfig, *, batch: int, slots: int) -> tuple[Cache, ...]:
    """A KV cache of zeros, one `Cache` of [batch * KV, slots, head_dim] in the compute dtype per layer."""
    shape = (batch * cfg.num_key_value_heads, slots, cfg.head_dim)
    return tuple(Cache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype)) for _ in range(cfg.num_hidden_layers))


def lm_head_weight(params: Any) -> jax.Array:
    """The target's output head, [V, D]: its own matrix, or the embedding when tied."""
    return params["lm_head"] if "lm_head" in params else params["embed_tokens"]


def vocabulary_logits(hidden: jax.Array, weight: jax.Array) -> jax.Array:
    """Logits in float32, [..., D] and [V, D] -> [..., V]."""
    return project(hidden, weight.astype(hidden.dtype), dtype=jnp.float32)


def most_likely(logits: jax.Array) -> jax.Array:
    """The first of the largest logits, [..., V] -> int32 [...].

    XLA on CPU takes a maximum at the speed of memory but an argmax ten times slower: there, the group of logits that
    holds it is looked for first.
    """
    size = logits.shape[-1]
    groups = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    if jax.default_backend() != "cpu" or groups == 1:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    grouped = logits.reshape(*logits.shape[:-1], groups, size // groups)
    group = jnp.argmax(jnp.max(grouped, axis=-1), axis=-1)
    inside = jnp.take_along_axis(grouped, group[..., None, None], axis=-2)[..., 0, :]
    return (group * (size // groups) + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def stack_layers(params: Any) -> Any:
    """The same parameters with `layers_0 .. layers_{L-1}` stacked under `layers/layer`, for `scan_layers`."""
    names = sorted((name for name in params if name.startswith("layers_")), key=lambda name: int(name.split("_")[1]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    return {**rest, "layers": {"layer": stacked}}


def first_layers(params: Any, depth: int) -> Any:
    """The parameters of `Target(cfg, depth=depth)`: enough where only captured states are wanted."""
    dropped = [name for name in params if name.startswith("layers_") and int(name[7:]) >= depth]
    return {name: leaf for name, leaf in params.items() if name not in dropped}
