"""Seconds of the parts of a speculative cycle, of a target's passes alone, and of batches."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding import speculate
from domino_jax.decoding.generate import generate
from domino_jax.decoding.speculate import Decoder, Weights, required_slots
from domino_jax.kernels.largest import most_likely
from domino_jax.kernels.products import vocabulary_logits
from domino_jax.target.model import Target, lm_head_weight

ROUNDS = 25  # repetitions of each measured part


def verification(target: Target, params: Any, *, context: int) -> dict[int, float]:
    """Median seconds of a target's pass over 1, 2, 4 and 8 tokens behind a context, with logits."""
    return {
        size: timed(*target_pass(target, params, size=size, context=context))
        for size in (1, 2, 4, 8)
    }


def target_pass(
    target: Target, params: Any, *, size: int, context: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A jitted pass over `size` tokens at `context`, and its arguments; the cache is donated."""
    cache = target.empty_cache(batch=1, slots=context + 64)
    tokens = jnp.ones((1, size), jnp.int32)
    positions = context + jnp.arange(size, dtype=jnp.int32)[None]

    def run(cache: Any, params: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        out = target.apply({"params": params}, tokens, positions, cache=cache)
        return out.cache, most_likely(vocabulary_logits(out.hidden, lm_head_weight(params)))

    return jax.jit(run, donate_argnums=0), (cache, params, tokens, positions)


def cycle_parts(decoder: Decoder, weights: Weights, *, context: int) -> dict[str, float]:
    """Median seconds of a cycle and of its parts; `rest` is acceptance, commits, caches' writes."""
    slots = context + 256
    prompt = np.ones(context, np.int32)
    state = speculate.start(decoder, weights, [prompt], max_new_tokens=128, slots=slots)
    bonus, key = state.tokens[:, context], jax.random.key(0)

    def drafting(use_head: bool) -> float:
        way = dataclasses.replace(decoder, use_head=use_head)
        run = jax.jit(lambda state, weights: speculate._draft(way, weights, state, bonus, key)[0])
        return timed(lambda: (None, run(state, weights)), ())

    draft = drafting(False)
    head = drafting(True) - draft if decoder.use_head else 0.0
    verify = timed(
        *target_pass(decoder.target, weights.target, size=decoder.proposals + 1, context=context)
    )
    one = jax.jit(lambda state: speculate._cycle(decoder, weights, state), donate_argnums=0)

    whole = timed(lambda state: (one(state), None), (state,))
    return {
        "cycle": whole,
        "draft": draft,
        "head": head,
        "verify": verify,
        "rest": whole - draft - head - verify,
    }


def timed(run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
    """Median seconds of calls that give back their first argument, new."""
    seconds = []
    for _ in range(ROUNDS + 3):
        began = time.perf_counter()
        out = jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - began)
        arguments = (out[0], *arguments[1:]) if arguments else ()
    return statistics.median(seconds[3:])


def batch_speed(
    decoder: Decoder, weights: Weights, prompts: list[np.ndarray], *, count: int
) -> dict[str, float]:
    """Tokens per second and tau of a batch whose rows accept different lengths."""
    slots = required_slots(decoder, max(map(len, prompts)), count)
    for _ in range(2):  # the first compiles
        answers = generate(decoder, weights, prompts, max_new_tokens=count, slots=slots)
    tokens = sum(len(answer.tokens) for answer in answers)
    committed, checks = sum(a.committed for a in answers), sum(a.verifications for a in answers)
    return {"tokens_per_second": tokens / answers[0].seconds, "tau": committed / checks}
