"""The named losses: what each makes of the draft's own predictions, and what a batch's sum is divided by."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.config import NORMALIZERS
from domino_jax.training.loss import TokenLoss


class Objective(NamedTuple):
    """One row of `OBJECTIVES`.

    `factor(token_loss, target_ids, mask, alpha)` multiplies the position weights, float32 [B, N, M]; no gradient flows
    through it. None leaves them alone. `normalize` is the default divisor, one of `NORMALIZERS`.
    """

    factor: Callable[[TokenLoss, jax.Array, jax.Array, float], jax.Array] | None
    normalize: str


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


def _dpace_form(form: str) -> Callable[[TokenLoss, jax.Array, jax.Array, float], jax.Array]:
    return lambda *arguments: dpace_weights(*arguments, form=form)


# D-PACE's weights are the objective: dividing by their sum would cancel them, so its blocks are averaged.
OBJECTIVES = {
    "dflash": Objective(None, "weights"),
    "variable_prefix": Objective(None, "weights"),
    "accept_until_fail": Objective(accept_until_fail, "weights"),
    "dpace": Objective(dpace_weights, "blocks"),
    "dpace-cumulative-confidence-only": Objective(_dpace_form("confidence"), "blocks"),
    "dpace-continuation-value-only": Objective(_dpace_form("continuation"), "blocks"),
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


def objective_sum(
    token_loss: TokenLoss,
    target_ids: jax.Array,
    mask: jax.Array,
    weights: jax.Array,
    *,
    loss_type: str,
    dpace_alpha: float,
    kl_weight: float,
) -> jax.Array:
    """The weighted sum over a batch, to be divided by `loss_divisor`.

    Args:
        token_loss: [B, N, M], with the divergence where `kl_weight` is to count.
        target_ids: int32 [B, N, M].
        mask: bool [B, N, M].
        weights: float32 [B, N, M], `position_weights`.
        loss_type: a row of `OBJECTIVES`.
        dpace_alpha: smoothing of D-PACE.
        kl_weight: share of the divergence, 0..1; the rest is cross-entropy.
    Returns:
        float32 scalar.
    """
    values = token_loss.nll
    if token_loss.divergence is not None:
        values = (1.0 - kl_weight) * values + kl_weight * token_loss.divergence
    factor = OBJECTIVES[loss_type].factor
    if factor is not None:
        weights = weights * jax.lax.stop_gradient(factor(token_loss, target_ids, mask, dpace_alpha))
    return jnp.sum(values * weights)
