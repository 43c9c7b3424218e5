"""Seconds of a speculative cycle by part, of a target's passes alone, and of batches."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.decoder import Decoder, Weights
from domino_jax.decoding.generate import generate
from domino_jax.decoding.speculate import required_cache_len
from domino_jax.evaluation.timing import cycle_times
from domino_jax.kernels.argmax import argmax
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import Target, lm_head_weight

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
    cache = target.empty_cache(batch=1, cache_len=context + 64)
    tokens = jnp.ones((1, size), jnp.int32)
    positions = context + jnp.arange(size, dtype=jnp.int32)[None]

    def run(cache: Any, params: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        out = target.apply({"params": params}, tokens, positions, cache=cache)
        return out.cache, argmax(vocabulary_logits(out.hidden, lm_head_weight(params)))

    return jax.jit(run, donate_argnums=0), (cache, params, tokens, positions)


def cycle_parts(decoder: Decoder, weights: Weights, *, context: int) -> dict[str, float]:
    """Median seconds of a cycle and of its parts, as `domino evaluate` times them."""
    times = cycle_times(decoder, weights, context=context, rounds=ROUNDS)
    return {
        "cycle": times.whole / 1e3,
        "draft": times.draft / 1e3,
        "head": (times.head or 0.0) / 1e3,
        "verify": times.verification / 1e3,
        "rest": times.rest / 1e3,
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
    cache_len = required_cache_len(decoder, max(map(len, prompts)), count)
    for _ in range(2):  # the first compiles
        answers = generate(decoder, weights, prompts, max_new_tokens=count, cache_len=cache_len)
    tokens = sum(len(answer.tokens) for answer in answers)
    committed, checks = sum(a.committed for a in answers), sum(a.verifications for a in answers)
    return {"tokens_per_second": tokens / answers[0].seconds, "tau": committed / checks}
