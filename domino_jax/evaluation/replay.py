"""Drafts run alone on known greedy answers, which are what verification would commit.

Verifying is what costs. So the target reads each text once, and all tokens of an answer are anchors
at once, as in training. A draft is kept as far as it agrees with the text; so far the head has read
the text, too:

    text    t0 t1 t2 t3 t4 t5
    at t0      t1 t2  x            2 kept: the cycle from t0 on writes t1 t2 and the target's own t3
    at t1          x               0
    at t2             t3 t4  x     2
    at t3                 x        0: the cycle from t3 on writes the target's own t4

The counts are decoding's, but where two logits are a tie for the arithmetic.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import Answer, require_finite_logits
from domino_jax.decoding.speculate import are_finite, bucketed, remember
from domino_jax.draft.backbone import output_logits
from domino_jax.draft.mask import layer_spans
from domino_jax.evaluation.counts import in_cycles
from domino_jax.kernels.argmax import argmax
from domino_jax.kernels.kv_cache import Cache
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import lm_head_weight

DRAFTED = 512  # positions at a time: their logits are held, [DRAFTED, V]


class Agreement(NamedTuple):
    """Drafts of anchors [B, N] against the text: predictions up to the first that differs.

    `kept` int32 [B, N] counts those that agree; `finite` bool [B, N] tells whether the logits of
    the one that does not are finite. A prediction whose logits are not finite never agrees.
    """

    kept: jax.Array
    finite: jax.Array


def replayed(
    modes: Mapping[str, Decoder],
    weights: Weights,
    prompts: Sequence[np.ndarray],
    answers: Sequence[Answer],
    *,
    cache_len: int,
    max_new_tokens: int,
) -> dict[str, list[Answer]]:
    """Known answers as each way to draft would have written them.

    Args:
        modes: one target and draft at temperature 0, with their own proposals, head on or off.
        weights: parameters of both.
        prompts: token ids, at least one each.
        answers: the target's own greedy ones.
        cache_len: positions of the context; those of the longest text at least.
        max_new_tokens: of the longest answer at least. Another number, as other slots, is another
            program.
    Returns:
        By way, one `Answer` per prompt; it has no time.
    Raises:
        InputError: logits of the draft are not finite where decoding would use them.
    """
    texts = [
        np.concatenate([prompt, answer.tokens])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    padded = np.zeros((len(texts), bucketed(max(map(len, texts)))), np.int32)
    for index, text in enumerate(texts):
        padded[index, : len(text)] = text
    begins = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    one = next(iter(modes.values()))
    # One program, however many proposals: those of a block are cut below.
    decoder = replace(one, proposals=0, use_head=any(mode.use_head for mode in modes.values()))
    tokens, context = _read(decoder, weights, jnp.asarray(padded), cache_len=cache_len)
    base, corrected = jax.device_get(
        _agreements(decoder, weights, tokens, context, begins, count=max_new_tokens)
    )
    written = {}
    for name, mode in modes.items():
        found = corrected if mode.use_head else base
        kept = np.minimum(found.kept, mode.proposals)
        written[name] = [in_cycles(*pair) for pair in zip(answers, kept, strict=True)]
        rows = zip(written[name], found.kept, found.finite, strict=True)
        finite = [_is_finite(*row, proposals=mode.proposals) for row in rows]
        require_finite_logits("draft", np.array(finite))
    return written


def _is_finite(answer: Answer, kept: np.ndarray, finite: np.ndarray, *, proposals: int) -> bool:
    """Whether the logits of the drafts that decided an answer are finite; `Agreement` of [N]."""
    # A cycle begins behind each token of the target's own but the last of the answer.
    anchors = np.flatnonzero(~answer.drafted[:-1])
    refused = kept[anchors]
    decided = (refused < proposals) & (anchors + 1 + refused < len(answer.drafted))
    return bool(np.all(finite[anchors] | ~decided))


@functools.partial(jax.jit, static_argnames=("decoder", "cache_len"))
def _read(
    decoder: Decoder, weights: Weights, texts: jax.Array, *, cache_len: int
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Texts [B, T] and the draft's context of them, both filled up to `cache_len`."""
    assert decoder.draft is not None
    batch, padded = texts.shape
    features = decoder.target.apply({"params": weights.target}, texts).features
    empty = decoder.draft.empty_cache(batch=batch, cache_len=max(cache_len, padded))
    context = remember(decoder, weights, empty, features, jnp.zeros(batch, jnp.int32))
    return jnp.pad(texts, ((0, 0), (0, max(cache_len - padded, 0)))), context


@functools.partial(jax.jit, static_argnames=("decoder", "count"))
def _agreements(
    decoder: Decoder,
    weights: Weights,
    tokens: jax.Array,
    context: tuple[Cache, ...],
    begins: jax.Array,
    *,
    count: int,
) -> tuple[Agreement, Agreement]:
    """Drafts behind each of `count` tokens from `begins`, [B]: two of [B, count].

    Those of the backbone alone, and with the head.
    """
    assert decoder.draft is not None
    cfg = decoder.draft.cfg
    model = decoder.draft.bind({"params": weights.draft})
    embedding, lm_head = weights.target["embed_tokens"], lm_head_weight(weights.target)
    batch, cache_len = tokens.shape
    used = jnp.ones((batch, 1), bool)
    offsets = jnp.arange(cfg.block_size, dtype=jnp.int32)

    def of_anchors(anchors: jax.Array) -> tuple[Agreement, Agreement]:  # [B, N] -> two of it
        # The anchor, and what each prediction should say.
        places = anchors[..., None] + jnp.arange(cfg.num_predictions + 1, dtype=jnp.int32)
        flat = jnp.minimum(places, cache_len - 1).reshape(batch, -1)
        text = jnp.take_along_axis(tokens, flat, axis=1).reshape(places.shape)
        noise = jnp.where(offsets == 0, text[..., :1], cfg.mask_token_id)
        # The context holds later states too, which no block sees: its spans end at the anchor.
        hidden = model.block_states(
            context,
            jnp.take(embedding, noise, axis=0),
            anchors[..., None] + offsets,
            layer_spans(cfg, anchors, jnp.broadcast_to(used, anchors.shape)),
        )
        hidden = model.prediction_states(hidden)
        base = output_logits(cfg, vocabulary_logits(hidden, lm_head))
        alone = _agreement(base, text)
        if not decoder.use_head:
            return alone, alone
        factors = model.corrections(hidden, jnp.take(embedding, text[..., :-1], axis=0))
        logits = base + vocabulary_logits(factors, model.head.expansion)
        return alone, _agreement(logits, text)

    at_once = max(DRAFTED // (batch * cfg.block_size), 1)
    turns = -(-count // at_once)
    anchors = begins[:, None] + jnp.arange(turns * at_once, dtype=jnp.int32)
    found = jax.lax.map(of_anchors, anchors.reshape(batch, turns, at_once).swapaxes(0, 1))
    return jax.tree.map(lambda one: one.swapaxes(0, 1).reshape(batch, -1)[:, :count], found)


def _agreement(logits: jax.Array, text: jax.Array) -> Agreement:
    """Predictions against the text, [B, N, M, V], [B, N, 1 + M] -> of [B, N]."""
    finite = are_finite(logits)
    agrees = (argmax(logits) == text[..., 1:]) & finite
    kept = jnp.sum(jnp.cumprod(agrees.astype(jnp.int32), axis=-1), axis=-1)
    # Behind the last prediction there is none that could differ.
    differing = jnp.minimum(kept, finite.shape[-1] - 1)[..., None]
    return Agreement(kept, jnp.take_along_axis(finite, differing, axis=-1)[..., 0])
