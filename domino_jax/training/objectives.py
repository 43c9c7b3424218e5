"""The named losses: what each makes of the draft's own predictions, and what a batch's sum is divided by."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.config import NORMALIZERS
from domino_jax.training.loss import TokenLoss

Factor = Callable[[TokenLoss, jax.Array, jax.Array, float], jax.Array]


class LossRow(NamedTuple):
    """One row of `OBJECTIVES`.

    `factor(token_loss, target_ids, mask, alpha)` multiplies the position weights, float32 [B, N, M]. `normalize` is the
    default divisor, one of `NORMALIZERS`.
    """

    factor: Factor
    normalize: str


def position_weights_alone(token_loss: TokenLoss, target_ids: jax.Array, mask: jax.Array, alpha: float) -> jax.Array:
    """1 everywhere: the draft's own predictions change nothing."""
    del target_ids, mask, alpha
    return jnp.ones_like(token_loss.nll)


def dpace_weights(
    token_loss: TokenLoss, target_ids: jax.Array, mask: jax.Array, alpha: float, *, form: str = "whole"
) -> jax.Array:
    """D-PACE: how much a position contributes to the expected length of the accepted prefix.

    With the draft's confidence `q = exp(-nll)` smoothed to `(1 - alpha) q + alpha` and `P_m` the product up to m,
    position j weighs `sum over m >= j of P_m`.

    Args:
        token_loss: of the logits that are weighted, [B, N, M].
        target_ids: not read.
        mask: bool [B, N, M]; other positions neither scale the product nor add to the sum.
        alpha: smoothing, 0..1.
        form: "whole", or one of its two factors: "confidence" (`P_j`), "continuation" (`sum / P_j`).
    Returns:
        float32 [B, N, M].
    Source: D-PACE (arXiv:2605.18810), equations 7 and 8; SpecForge 0.2.0 has the same three forms.
    """
    del target_ids
    smooth = jnp.where(mask, (1.0 - alpha) * jnp.exp(-token_loss.nll) + alpha, 1.0)
    prefix = jnp.cumprod(smooth, axis=-1)
    if form == "confidence":
        return prefix
    rest = jnp.flip(jnp.cumsum(jnp.flip(prefix * mask, axis=-1), axis=-1), axis=-1)
    return rest if form == "whole" else rest / jnp.maximum(prefix, jnp.finfo(jnp.float32).tiny)


def accept_until_fail(token_loss: TokenLoss, target_ids: jax.Array, mask: jax.Array, alpha: float) -> jax.Array:
    """1 up to and with the first wrong prediction of a block, 0 after it: what verification would never reach.

    Shapes as in `dpace_weights`; `alpha` is not read.
    """
    del alpha
    right = (token_loss.prediction == target_ids) | ~mask
    reached = jnp.cumprod(right.astype(jnp.float32), axis=-1)
    return jnp.pad(reached[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=1.0)


# D-PACE's weights are the objective: dividing by their sum would cancel them, so its blocks are averaged.
OBJECTIVES = {
    "dflash": LossRow(position_weights_alone, "weights"),
    "variable_prefix": LossRow(position_weights_alone, "weights"),
    "accept_until_fail": LossRow(accept_until_fail, "weights"),
    "dpace": LossRow(dpace_weights, "blocks"),
    "dpace-cumulative-confidence-only": LossRow(functools.partial(dpace_weights, form="confidence"), "blocks"),
    "dpace-continuation-value-only": LossRow(functools.partial(dpace_weights, form="continuation"), "blocks"),
}


def loss_divisor(weights: jax.Array, mask: jax.Array, *, normalize: str) -> jax.Array:
    """What the weighted sum of a batch is divided by; never depends on what the draft predicts.

    Args:
        weights: float32 [B, N, M], position weights before any factor.
        mask: bool [B, N, M], supervised predictions.
        normalize: "weights" sums the position weights, "tokens" counts supervised predictions,
            "blocks" the blocks that have one.
    Returns:
        float32 scalar.
    Raises:
        ValueError: another name.
    """
    if normalize == "weights":
        return jnp.sum(weights)
    if normalize == "tokens":
        return jnp.sum(mask.astype(jnp.float32))
    if normalize == "blocks":
        return jnp.sum(jnp.any(mask, axis=-1).astype(jnp.float32))
    raise ValueError(f"normalize must be one of {', '.join(NORMALIZERS)}, found {normalize!r}")
