"""Tokens per second at batch 1, with the draft and without.

The two take turns at each prompt: where a machine slows down, both are slowed down alike.
"""

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from domino_jax.base.progress import STDERR, Reporter
from domino_jax.decoding.decoder import Decoder, Weights, alone
from domino_jax.decoding.generate import Answer, generate
from domino_jax.decoding.speculate import required_cache_len


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1, reading the prompt included, of the first prompts of a set."""

    prompts: int
    tokens_per_second: float
    tokens_per_second_plain: float

    @property
    def speed_up(self) -> float:
        """With the draft over the target alone."""
        return self.tokens_per_second / self.tokens_per_second_plain

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it."""
        return asdict(self) | {"speed_up": self.speed_up}


def measured_speed(
    decoder: Decoder,
    weights: Weights,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    cache_len: int,
    seed: int = 0,
    reporter: Reporter = STDERR,
) -> tuple[Speed | None, list[Answer]]:
    """Tokens per second of a target with its draft and alone, in turns, programs warmed up.

    Args:
        decoder: target and draft.
        weights: parameters of both.
        prompts: token ids of each prompt; of none nothing is measured.
        max_new_tokens: per answer.
        cache_len: cache positions, see `speculate.start`; enough for an answer of two tokens.
        seed: of the sampler.
        reporter: is told each prompt.
    Returns:
        The figures, and the answers with the draft.
    """
    if not prompts:
        return None, []
    run = functools.partial(generate, weights=weights, cache_len=cache_len, seed=seed)
    modes = {"plain": alone(decoder), "drafted": decoder}
    # A prompt of each bucket that prompts are padded to: every bucket is a program of its own.
    buckets = {required_cache_len(modes["plain"], len(prompt), 0): prompt for prompt in prompts}
    for mode in modes.values():
        for prompt in buckets.values():
            # Two tokens: the pass over the prompt gives the first, so the loop runs for another.
            run(mode, prompts=[prompt], max_new_tokens=2)
    answers: dict[str, list[Answer]] = {name: [] for name in modes}
    with reporter.bar("timed", total=len(prompts)) as bar:
        for done, prompt in enumerate(prompts, start=1):
            for name, mode in modes.items():
                answers[name] += run(mode, prompts=[prompt], max_new_tokens=max_new_tokens)
            bar.tell(done)
    rates = {
        name: sum(len(answer.tokens) for answer in given) / sum(answer.seconds for answer in given)
        for name, given in answers.items()
    }
    return Speed(len(prompts), rates["drafted"], rates["plain"]), answers["drafted"]
