"""Comparison of speculative greedy answers with the target's own, token by token.

Two greedy outputs may part where two logits are a tie for the arithmetic. So a difference has the
gap between both logits, which tells a tie from a fault.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from domino_jax.decoding.decoder import Weights
from domino_jax.decoding.generate import Answer, require_finite_logits
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.target.decoder import Target, lm_head_weight

# Two logits closer than this may change places between one-token and block-wise arithmetic. In
# bfloat16 states have eight bits, and logits of 16 to 32 follow them by a quarter.
TIES = {"float32": 1e-3, "bfloat16": 0.25}


@dataclass(frozen=True)
class Difference:
    """The first place where two greedy outputs differ, and how far apart the target's logits are.

    `logit_gap` is between both tokens after the common prefix; a token is -1, and the gap None,
    where that output had already ended.
    """

    prompt: int
    position: int
    plain_token: int
    speculative_token: int
    logit_gap: float | None


@dataclass(frozen=True)
class Comparison:
    """Greedy outputs, compared token by token up to the first difference of each prompt."""

    tokens_compared: int
    tokens_equal: int
    differences: tuple[Difference, ...]
    tie: float

    @property
    def lossless(self) -> bool:
        """Whether every difference is a tie of the target's logits, closer than `tie`."""
        # An output that ended early is no tie: its missing token has no logit to compare.
        gaps = [one.logit_gap for one in self.differences]
        return all(gap is not None and gap < self.tie for gap in gaps)

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.tokens_compared + other.tokens_compared,
            self.tokens_equal + other.tokens_equal,
            self.differences + other.differences,
            self.tie,
        )

    def as_json(self) -> dict[str, Any]:
        """As evaluations record it."""
        return asdict(self) | {"lossless": self.lossless}


def compare(
    weights: Weights,
    target: Target,
    prompts: Sequence[np.ndarray],
    plain: Sequence[Answer],
    speculative: Sequence[Answer],
) -> Comparison:
    """Compares speculative greedy answers with plain ones.

    A prompt is compared up to the first difference: behind it the prefixes differ.

    Args:
        weights: parameters of the target.
        target: the target.
        prompts: token ids of each prompt.
        plain: answers of the target alone.
        speculative: answers with a draft.
    Raises:
        InputError: the target's logits behind a common prefix are not finite.
    """
    compared = equal = 0
    differences = []
    pairs = zip(prompts, plain, speculative, strict=True)
    for index, (prompt, left, right) in enumerate(pairs):
        position = first_difference(left.tokens, right.tokens)
        if position is None:
            compared += len(left.tokens)
            equal += len(left.tokens)
            continue
        compared += position + 1
        equal += position
        left_token, right_token = (
            int(one.tokens[position]) if position < len(one.tokens) else -1 for one in (left, right)
        )
        gap = None
        if -1 not in (left_token, right_token):
            read = np.concatenate([prompt, left.tokens[:position]])
            logits = next_logits(target, weights.target, read)
            gap = float(abs(logits[left_token] - logits[right_token]))
            require_finite_logits("target", np.isfinite([gap]))
        differences.append(Difference(index, position, left_token, right_token, gap))
    return Comparison(compared, equal, tuple(differences), TIES[target.cfg.dtype])


def first_difference(left: np.ndarray, right: np.ndarray) -> int | None:
    """Where two outputs part, int32 [n] and [m]; None where they are the same."""
    shorter = min(len(left), len(right))
    unequal = np.flatnonzero(left[:shorter] != right[:shorter])
    if len(unequal):
        return int(unequal[0])
    # Equal as far as both go: they part where one of them has ended.
    return None if len(left) == len(right) else shorter


def next_logits(target: Target, params: Any, tokens: np.ndarray) -> np.ndarray:
    """The target's logits after a sequence, int32 [n] -> float32 [V], by one pass over it."""

    # Compiled for each length, and without a cache: it is called for differences, which are rare.
    @jax.jit
    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        out = Target(target.cfg).apply({"params": params}, tokens)
        return vocabulary_logits(out.hidden[0, -1], lm_head_weight(params))

    return np.asarray(logits(params, jnp.asarray(tokens)[None]))
