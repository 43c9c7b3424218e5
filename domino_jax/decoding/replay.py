"""What greedy decoding commits is the target's own text: where that is known, drafts run alone.

Several drafts, and several ways to draft, are measured on the same prompts, and verifying is what
costs. So the target reads each text once, and the cycles that would have written it follow:

    decoding    draft -> the target reads the block    -> accepted, its own token
    here        draft -> the text says what comes next -> accepted, its own token

The counts are decoding's, but where two logits are a tie for the arithmetic.
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.acceptance import accept_greedy
from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import Answer, finished_answers
from domino_jax.decoding.speculate import DecodeState, behind, bucketed, draft_block, remember


def read_texts(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    answers: Sequence[np.ndarray],
    *,
    slots: int,
) -> DecodeState:
    """Prompts with answers that are known already, before any cycle.

    Args:
        decoder: target and draft, at temperature 0; however it drafts, the state is the same.
        weights: parameters of both.
        prompts: token ids, at least one each.
        answers: the target's own greedy tokens to each of them, at least one each.
        slots: cache positions, at least `required_slots` of the longest prompt and answer.
    """
    texts = [np.concatenate(pair) for pair in zip(prompts, answers, strict=True)]
    padded = np.zeros((len(texts), bucketed(max(map(len, texts)))), np.int32)
    for index, text in enumerate(texts):
        padded[index, : len(text)] = text
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    limits = jnp.array([len(text) for text in texts], jnp.int32)
    reader = replace(decoder, proposals=0, use_head=False)
    return _read(reader, weights, jnp.asarray(padded), lengths, limits, slots=slots)


def replayed(
    decoder: Decoder, weights: Weights, state: DecodeState, prompts: Sequence[np.ndarray]
) -> list[Answer]:
    """Known answers as a decoder would have written them.

    Args:
        decoder: target and draft, at temperature 0.
        weights: parameters of both.
        state: of `read_texts`; it is not consumed: several ways to draft can start there.
        prompts: the first ones of the state; what it was filled up with is left out.
    Returns:
        One `Answer` per prompt; its time is no decoding's.
    """
    began = time.perf_counter()
    state = _replay(decoder, weights, state)
    np.asarray(state.lengths)  # waits for the device
    return finished_answers(decoder, state, prompts, seconds=time.perf_counter() - began)


@functools.partial(jax.jit, static_argnames=("decoder", "slots"))
def _read(
    decoder: Decoder,
    weights: Weights,
    texts: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    *,
    slots: int,
) -> DecodeState:
    assert decoder.draft is not None
    batch, padded = texts.shape
    zeros = jnp.zeros_like(lengths)
    features = decoder.target.apply({"params": weights.target}, texts).features
    empty = decoder.draft.empty_cache(batch=batch, slots=max(slots, padded))
    draft_cache = remember(decoder, weights, empty, features, zeros)
    tokens = jnp.pad(texts, ((0, 0), (0, max(slots - padded, 0))))
    drafted = jnp.zeros(tokens.shape, bool)
    begun = lengths + 1  # the first token of an answer costs no verification
    key = jax.random.key(0)  # nothing is drawn
    return DecodeState(
        tokens, drafted, begun, limits, begun >= limits, zeros, zeros, (), draft_cache, key
    )


@functools.partial(jax.jit, static_argnames=("decoder",))
def _replay(decoder: Decoder, weights: Weights, state: DecodeState) -> DecodeState:
    known = state.tokens  # of the state itself a cycle writes over what follows it

    def body(state: DecodeState) -> DecodeState:
        block = draft_block(decoder, weights, state, state.key).block
        places = state.lengths[:, None] + jnp.arange(block.shape[1], dtype=jnp.int32)
        # The context holds later states too, which no draft sees: its spans end at the anchor.
        choices = jnp.take_along_axis(known, places, axis=1)
        accepted, following = accept_greedy(block[:, 1:], choices)
        return behind(decoder, state, block, accepted, following)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.finished), body, state)
