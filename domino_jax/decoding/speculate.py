"""The speculative loop; plain decoding is the same loop without proposals.

A cycle of P = 3 from `lengths` = n:

position           n-2  n-1  n    n+1  n+2
committed, drafted t    b    d1   d2   d3    b `bonus`, unread; d from the states before it
one target pass         b    d1   d2   d3    writes both caches from n-1 on
its next tokens         d1   x    .    .     one after each token that it reads
committed          t    b    d1   x          d1 accepted, x is the next b; d2, d3 are stale
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.acceptance import accept_greedy, accept_sampled
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.filters import filtered
from domino_jax.draft.backbone import DraftModel, output_logits
from domino_jax.draft.mask import layer_spans
from domino_jax.kernels import kv_cache
from domino_jax.kernels.argmax import argmax
from domino_jax.kernels.kv_cache import Cache
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import LayerCaches, lm_head_weight

PROMPT_BUCKET = 64  # prompts are padded to a multiple of this, so that few lengths are compiled


class DecodeState(NamedTuple):
    """Prompts in the middle of being answered; `committed` and `verifications` give tau.

    Caches hold what lies before the last committed token; the rest is stale and never seen.
    """

    tokens: jax.Array  # int32 [B, L], from the prompt on
    drafted: jax.Array  # bool [B, L], committed tokens that were proposed; the rest is the target's
    lengths: jax.Array  # int32 [B], committed tokens; the target has not read the last one yet
    limits: jax.Array  # int32 [B], the length that ends an answer
    finished: jax.Array  # bool [B]; also where an answer's logits are not finite
    target_finite: jax.Array  # bool [B], the target's logits behind the committed tokens
    draft_finite: jax.Array  # bool [B], likewise of the draft
    committed: jax.Array  # int32 [B]
    verifications: jax.Array  # int32 [B]
    target_cache: LayerCaches
    draft_cache: tuple[Cache, ...]
    key: jax.Array


def start(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    cache_len: int,
    longest: int = 0,
    seed: int = 0,
) -> DecodeState:
    """Reads the prompts and commits the first token of each answer.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: tokens of each answer at most.
        cache_len: cache positions, at least `required_cache_len`; one number compiles once.
        longest: tokens that prompts are filled up to at least, likewise.
    Raises:
        ValueError: too few slots or an empty prompt.
    """
    longest = max(longest, *map(len, prompts))
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("a prompt without tokens")
    needed = required_cache_len(decoder, longest, max_new_tokens)
    if cache_len < needed:  # XLA would clamp, in silence
        raise ValueError(f"{cache_len} cache slots; {needed} are needed")
    padded = np.zeros((len(prompts), bucketed(longest)), np.int32)
    for index, prompt in enumerate(prompts):
        padded[index, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    reader = replace(decoder, proposals=0, use_head=False)  # however the draft is used: one program
    limits = lengths + max_new_tokens
    key = jax.random.key(seed)
    return _prefill(reader, weights, padded, lengths, limits, key, cache_len=cache_len)


def required_cache_len(decoder: Decoder, prompt_length: int, max_new_tokens: int) -> int:
    """Cache positions for prompts up to `prompt_length`; a last block may reach past the limit."""
    return max(bucketed(prompt_length), prompt_length + max_new_tokens) + decoder.proposals + 1


def stream(
    decoder: Decoder, weights: Weights, state: DecodeState, *, cycles: int
) -> Iterator[DecodeState]:
    """Yields the state after every `cycles` cycles until all answers end; each is consumed next."""
    yield state
    while not bool(np.all(state.finished)):
        state = advance(decoder, weights, state, cycles=cycles)
        yield state


def finish(decoder: Decoder, weights: Weights, state: DecodeState) -> DecodeState:
    """Runs until all answers are finished."""
    return advance(decoder, weights, state, cycles=np.iinfo(np.int32).max)


@functools.partial(jax.jit, static_argnames=("decoder", "cache_len"))
def _prefill(
    decoder: Decoder,
    weights: Weights,
    prompts: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    key: jax.Array,
    *,
    cache_len: int,
) -> DecodeState:
    """Reads prompts int32 [B, T], filled up at their ends; see `DecodeState` for the rest."""
    batch, padded = prompts.shape
    cache = decoder.target.empty_cache(batch=batch, cache_len=cache_len)
    out = decoder.target.apply({"params": weights.target}, prompts, cache=cache)
    last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    # Of the last position alone: nothing reads the logits of all, [B, T, V].
    logits = vocabulary_logits(last, lm_head_weight(weights.target))
    key, draw = jax.random.split(key)
    first, finite = _pick(decoder, draw, logits), are_finite(logits)
    draft_cache: tuple[Cache, ...] = ()
    if decoder.draft is not None:
        draft_cache = decoder.draft.empty_cache(batch=batch, cache_len=cache_len)
        draft_cache = remember(decoder, weights, draft_cache, out.features, jnp.zeros_like(lengths))
    tokens = jnp.pad(prompts, ((0, 0), (0, cache_len - padded)))
    tokens = _written(tokens, first[:, None], lengths)
    drafted = jnp.zeros(tokens.shape, bool)
    zeros = jnp.zeros_like(lengths)  # the first token costs no verification: tau leaves it out
    finished = _is_stop(decoder, first) | (lengths + 1 >= limits) | ~finite
    return DecodeState(
        tokens=tokens,
        drafted=drafted,
        lengths=lengths + 1,
        limits=limits,
        finished=finished,
        target_finite=finite,
        draft_finite=jnp.ones_like(finite),
        committed=zeros,
        verifications=zeros,
        target_cache=out.cache,
        draft_cache=draft_cache,
        key=key,
    )


# `cycles` is traced: one program for any number of them.
@functools.partial(jax.jit, static_argnames=("decoder",), donate_argnames=("state",))
def advance(
    decoder: Decoder, weights: Weights, state: DecodeState, *, cycles: int | jax.Array
) -> DecodeState:
    """Runs up to `cycles` cycles, fewer when all answers end; the state given is consumed."""

    def unfinished(carry: tuple[jax.Array, DecodeState]) -> jax.Array:
        done, state = carry
        return (done < cycles) & ~jnp.all(state.finished)

    def body(carry: tuple[jax.Array, DecodeState]) -> tuple[jax.Array, DecodeState]:
        done, state = carry
        return done + 1, cycle(decoder, weights, state)

    _, state = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))
    return state


class Drafts(NamedTuple):
    """The bonus token and the drafted ones, int32 [B, 1 + P], and what those were drawn from."""

    block: jax.Array
    finite: jax.Array  # bool [B, P], the logits of each drafted token
    probs: jax.Array  # float32 [B, P, V] when sampling


class Verified(NamedTuple):
    """What the target says of a block: float32 [B, 1 + P, V], states for the draft, its cache."""

    logits: jax.Array
    features: jax.Array
    cache: LayerCaches


def cycle(decoder: Decoder, weights: Weights, state: DecodeState) -> DecodeState:
    """Draft, verify, commit."""
    key, draft_key, accept_key = jax.random.split(state.key, 3)
    drafts = draft_block(decoder, weights, state, draft_key)
    verified = verify(decoder, weights, state, drafts.block)
    return commit(decoder, weights, state._replace(key=key), drafts, verified, accept_key)


def draft_block(decoder: Decoder, weights: Weights, state: DecodeState, key: jax.Array) -> Drafts:
    """The bonus token and what is drafted behind it."""
    bonus = jnp.take_along_axis(state.tokens, (state.lengths - 1)[:, None], axis=1)
    drafted, finite, probs = _draft(decoder, weights, state, bonus[:, 0], key)
    # The bonus token goes first: its logits choose the token that d1 is verified against.
    return Drafts(jnp.concatenate([bonus, drafted], axis=1), finite, probs)


def verify(decoder: Decoder, weights: Weights, state: DecodeState, block: jax.Array) -> Verified:
    """One pass of the target over a block."""
    positions = (state.lengths - 1)[:, None] + jnp.arange(block.shape[1], dtype=jnp.int32)
    out = decoder.target.apply(
        {"params": weights.target}, block, positions, cache=state.target_cache
    )
    logits = vocabulary_logits(out.hidden, lm_head_weight(weights.target))
    return Verified(logits, out.features, out.cache)


def commit(
    decoder: Decoder,
    weights: Weights,
    state: DecodeState,
    drafts: Drafts,
    verified: Verified,
    key: jax.Array,
) -> DecodeState:
    """The state behind a verified block: the accepted tokens, then the target's own."""
    block, logits = drafts.block, verified.logits
    begin = state.lengths - 1
    if decoder.temperature > 0:
        target_probs = jax.nn.softmax(_drawn_from(decoder, logits), axis=-1)
        accepted, following = accept_sampled(key, block[:, 1:], drafts.probs, target_probs)
    else:
        accepted, following = accept_greedy(block[:, 1:], argmax(logits))
    # What is written behind the target's own token is overwritten by the next cycle.
    index = jnp.arange(block.shape[1])
    new = jnp.where(index < accepted[:, None], jnp.roll(block, -1, axis=1), following[:, None])
    stops = _is_stop(decoder, new) & (index <= accepted[:, None])
    until_stop = jnp.where(jnp.any(stops, axis=1), jnp.argmax(stops, axis=1), accepted) + 1
    count = jnp.where(state.finished, 0, jnp.minimum(until_stop, state.limits - state.lengths))
    lengths = state.lengths + count
    # The logits that decided a committed token; what lies behind the last of them is never used.
    unused = index >= count[:, None]
    target_finite = state.target_finite & jnp.all(are_finite(logits) | unused, axis=1)
    draft_finite = state.draft_finite & jnp.all(drafts.finite | unused[:, :-1], axis=1)
    ended = jnp.any(stops, axis=1) | (lengths >= state.limits)
    active = (~state.finished).astype(jnp.int32)  # shapes are static: finished ones run along
    state = state._replace(
        tokens=_written(state.tokens, new, state.lengths),
        drafted=_written(state.drafted, index < accepted[:, None], state.lengths),
        lengths=lengths,
        finished=state.finished | ended | ~target_finite | ~draft_finite,
        target_finite=target_finite,
        draft_finite=draft_finite,
        committed=state.committed + count,
        verifications=state.verifications + active,
        target_cache=verified.cache,
    )
    if decoder.draft is None:
        return state
    draft_cache = remember(decoder, weights, state.draft_cache, verified.features, begin)
    return state._replace(draft_cache=draft_cache)


def remember(
    decoder: Decoder,
    weights: Weights,
    cache: tuple[Cache, ...],
    features: jax.Array,
    begin: jax.Array,
) -> tuple[Cache, ...]:
    """Adds the target's states at `begin ..`, [B, T, C*D], to the draft's context."""
    positions = begin[:, None] + jnp.arange(features.shape[1], dtype=jnp.int32)
    variables = {"params": weights.draft}
    new = decoder.draft.apply(  # type: ignore[union-attr]
        variables, features, positions, method=DraftModel.context
    )
    return tuple(
        kv_cache.write(old, keys, values, begin)
        for old, (keys, values) in zip(cache, new, strict=True)
    )


def _draft(
    decoder: Decoder, weights: Weights, state: DecodeState, bonus: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Proposed tokens [B, P], whether their logits are finite, and their distributions [B, P, V].

    Greedy drafts have no distributions: theirs are not read.
    """
    # A draft of one prediction proposes none where K - 1 tokens are proposed.
    if decoder.draft is None or decoder.proposals == 0:
        none = jnp.zeros((bonus.shape[0], 0), jnp.int32)
        undrawn = jnp.zeros((*none.shape, decoder.target.cfg.vocab_size))
        return none, none.astype(bool), undrawn
    model, cfg = decoder.draft.bind({"params": weights.draft}), decoder.draft.cfg
    embedding = weights.target["embed_tokens"]
    anchors = state.lengths - 1
    offsets = jnp.arange(cfg.block_size, dtype=jnp.int32)
    noise = jnp.where(offsets == 0, bonus[:, None], cfg.mask_token_id)
    used = jnp.ones((bonus.shape[0], 1), bool)
    hidden = model.block_states(
        state.draft_cache,
        jnp.take(embedding, noise, axis=0)[:, None],
        (anchors[:, None] + offsets)[:, None],
        layer_spans(cfg, anchors[:, None], used),
    )
    hidden = model.prediction_states(hidden)[:, 0, : decoder.proposals]
    base = output_logits(cfg, vocabulary_logits(hidden, lm_head_weight(weights.target)))
    # As in training: the head reads every token, from the anchor on, corrected or not.
    tokens, finite, probs = [], [], []
    previous, known = bonus, model.head.initial_state(bonus.shape[0]) if decoder.use_head else None
    for index in range(decoder.proposals):
        logits = base[:, index]
        if decoder.use_head:
            known = model.head.step(known, jnp.take(embedding, previous, axis=0))
            if index >= cfg.pure_draft_prefix_len:
                factor = model.head.correction(hidden[:, index], known)
                logits += vocabulary_logits(factor, model.head.expansion)
        previous = _pick(decoder, jax.random.fold_in(key, index), logits)
        tokens.append(previous)
        finite.append(are_finite(logits))
        if decoder.temperature > 0:
            probs.append(jax.nn.softmax(_drawn_from(decoder, logits), axis=-1))
    distributions = jnp.stack(probs, axis=1) if probs else base
    return jnp.stack(tokens, axis=1), jnp.stack(finite, axis=1), distributions


def _pick(decoder: Decoder, key: jax.Array, logits: jax.Array) -> jax.Array:  # [B, V] -> [B]
    if decoder.temperature > 0:
        drawn = jax.random.categorical(key, _drawn_from(decoder, logits), axis=-1)
        return drawn.astype(jnp.int32)
    return argmax(logits)


def are_finite(logits: jax.Array) -> jax.Array:
    """Whether logits hold neither NaN nor infinity, [..., V] -> bool [...]."""
    # Not by their maximum: on a CPU XLA's loses a NaN among many numbers.
    return jnp.all(jnp.isfinite(logits), axis=-1)


def _drawn_from(decoder: Decoder, logits: jax.Array) -> jax.Array:
    """The logits that tokens are drawn from, of target and draft alike.

    Exactness needs the target's alone; but a draft that proposes what is filtered out is refused.
    """
    return filtered(logits / decoder.temperature, top_k=decoder.top_k, top_p=decoder.top_p)


def _is_stop(decoder: Decoder, tokens: jax.Array) -> jax.Array:
    return jnp.isin(tokens, jnp.array(decoder.stop_ids, jnp.int32))


def _written(old: jax.Array, new: jax.Array, begin: jax.Array) -> jax.Array:
    """[B, L] with [B, n] from `begin`, [B], on."""
    return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
        old, new, begin, 0
    )


def bucketed(length: int) -> int:
    """A length with the padding that few programs need."""
    return -(-length // PROMPT_BUCKET) * PROMPT_BUCKET
