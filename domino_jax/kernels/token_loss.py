"""The loss of each prediction, shared by the loss's definition and its kernel.

hidden    h [B, N, M, D]    base logits     U = h W^T           [B, N, M, V]
low rank  r [B, N, M, R]    final logits    U + E = U + r W2^T  [B, N, M, V]
logits and target_ids       nll, prediction, divergence         [B, N, M]
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.kernels.argmax import argmax
from domino_jax.kernels.matmul import vocabulary_logits
from domino_jax.sharding import constrain


class TokenLoss(NamedTuple):
    """What the logits of each prediction say of its label, all [B, N, M].

    `nll` float32 is the negative log-likelihood, `prediction` int32 the most likely token,
    `divergence` float32 KL(target || draft), None where the target's states were not given.
    """

    nll: jax.Array
    prediction: jax.Array
    divergence: jax.Array | None = None


class States(NamedTuple):
    """`hidden` [B, N, M, D] of the backbone, `low_rank` [B, N, M, R] of the head, or None.

    `low_rank` is zero where the logits stay uncorrected.
    """

    hidden: jax.Array
    low_rank: jax.Array | None = None


class Tables(NamedTuple):
    """`lm_head` [V, D] of the target, frozen, and `expansion` [V, R] of the head, or None."""

    lm_head: jax.Array
    expansion: jax.Array | None = None


class Labels(NamedTuple):
    """Labels and weights of the predictions, all [B, N, M] but the last.

    `target_ids` int32; `mask` float32, the share in which a prediction is supervised; `weights`
    float32, the position weights, 0 outside the mask. `target_states` [B, N, M, D] are the target's
    normed states that predict the same tokens; None without a divergence.
    """

    target_ids: jax.Array
    mask: jax.Array
    weights: jax.Array
    target_states: jax.Array | None = None


@dataclass(frozen=True)
class Objective:
    """What a prediction costs, beyond its position weight.

    Attributes:
        factor: of `(token_loss, labels)`, float32 [B, n, M] over whole blocks; it multiplies each
            prediction's loss and is differentiated with it, except through what it stops itself.
        kl_weight: share of the divergence in a prediction's loss, the rest is the cross-entropy of
            its label.
        output_logits: what the target's head makes of its product, elementwise, before the
            correction is added.
        cost: of `(logits, labels, target_logits)`, float32 [B, N, M], takes the place of
            cross-entropy and divergence. It reads whole logits, which the kernel never has: such an
            objective runs on the definition.
    """

    factor: Callable[[TokenLoss, Labels], jax.Array] | None = None
    kl_weight: float = 0.0
    output_logits: Callable[[jax.Array], jax.Array] = lambda logits: logits
    cost: Callable[[jax.Array, Labels, jax.Array | None], jax.Array] | None = None


CROSS_ENTROPY = Objective()


class VocabularyLoss(NamedTuple):
    """Weighted sums over all predictions, float32 scalars, and what they were made of.

    `total = (1 - lambda_base) * final_sum + lambda_base * base_sum` alone carries a gradient.
    Without a head final and base are the same.
    """

    total: jax.Array
    final_sum: jax.Array
    base_sum: jax.Array
    final: TokenLoss
    base: TokenLoss


def token_loss(
    logits: jax.Array, target_ids: jax.Array, target_logits: jax.Array | None = None
) -> TokenLoss:
    """The definition of a prediction's loss, from float32 logits [..., V] and ids int32 [...].

    `target_logits` [..., V] are the target's own, for the divergence.
    """
    # Not the logarithm of a softmax: an unlikely label's could round to 0, with an infinite loss.
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    divergence = None
    if target_logits is not None:
        target_log_probs = jax.nn.log_softmax(target_logits, axis=-1)
        target_probs = jnp.exp(target_log_probs)
        divergence = jnp.sum(target_probs * (target_log_probs - log_probs), axis=-1)
    nll = -at_place(log_probs, target_ids)
    return TokenLoss(nll, argmax(logits), divergence)


def weighted_sum(token: TokenLoss, labels: Labels, objective: Objective) -> jax.Array:
    """The weighted sum of the predictions' losses, a float32 scalar."""
    values = token.nll
    if token.divergence is not None:
        values = (1.0 - objective.kl_weight) * values + objective.kl_weight * token.divergence
    if objective.factor is not None:
        values *= objective.factor(token, labels)
    # A sum: who adds up pieces, micro-batches or devices divides last, by a sum of its own.
    return jnp.sum(values * labels.weights)


def head_logits(states: jax.Array, table: jax.Array) -> jax.Array:
    """Float32 logits over the mesh, [B, N, M, D] and [V, D] -> [B, N, M, V]."""
    # The largest arrays of a step: split by vocabulary wherever its tables are.
    return constrain(vocabulary_logits(states, table), "batch", None, None, "vocab")


def at_place(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """The logit of each label, [..., V] and [...] -> [...]."""
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
