"""The loss of a draft in plain jnp, to be read and changed (Domino, arXiv:2605.29707).

A block of K positions is drafted at once and verified left to right, and what stands behind the
first wrong token is thrown away. Everything here follows from that:

    prediction m    0    1               2               ..   M - 1
    weight          1    e^(-1/gamma)    e^(-2/gamma)    ..   e^(-(M-1)/gamma)    times the mask

- *Position weights.* An early mistake costs the whole rest of the block, a late one little, so
  weights decay along the block: `w_m = mask_m exp(-m / gamma)`.
- *Two logits.* The backbone's own `U` are blind to the block's tokens; the head's `E` know the ones
  before them. Only `U + E` is decoded. But a head that learns fast leaves the backbone no reason to
  learn, so both are trained at first:
  `loss = (1 - lambda_base) final_loss + lambda_base base_loss`, with `lambda_base` falling to 0
  (`curriculum.py`).
- *One divisor.* Both losses are sums of weighted cross-entropies over `sum(w) + 1e-6`, which no
  prediction changes: micro-batches and devices add up sums and divide last, and a batch without any
  supervised token has the loss 0.

What a prediction costs besides is the objective's affair (`objectives.py`): D-PACE, for example,
weighs it by the draft's own confidence in the tokens before.

Training runs `kernels.chunked_cross_entropy`, the same sums without whole logits, which is tested
against `dual_loss`. An objective that reads whole logits runs on `dual_loss` itself.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.kernels.token_loss import (
    CROSS_ENTROPY,
    Labels,
    Objective,
    States,
    Tables,
    TokenLoss,
    VocabularyLoss,
    head_logits,
    token_loss,
    weighted_sum,
)


def position_weights(
    mask: jax.Array, *, gamma: float | None, prefix_lengths: jax.Array | None = None
) -> jax.Array:
    """Loss weights that decay along the block.

    Args:
        mask: float32 [B, N, M], the share in which each prediction is supervised.
        gamma: decay length in positions; None or a value <= 0 means no decay.
        prefix_lengths: int32 [B, N]; the decay then begins at the first position that is not shown.
    Returns:
        float32 [B, N, M], `mask * exp(-m / gamma)`, with a prefix of l positions
        `mask * exp(-(m + 1 - l) / gamma)`.
    Source: DFlash (arXiv:2602.06036), equation 4; NeMo AutoModel 0.7.0, `_variable_prefix_loss`.
    """
    if gamma is None or gamma <= 0:
        return mask
    distance = jnp.arange(mask.shape[-1])
    if prefix_lengths is not None:
        # Prediction m is the token of position m + 1, and l positions are shown. Never below 0: the
        # weight of a shown position could overflow, and the mask's 0 times infinity is NaN.
        distance = jnp.maximum(distance + 1 - prefix_lengths[..., None], 0)
    return mask * jnp.exp(-distance.astype(jnp.float32) / gamma)


def dual_loss(
    states: States,
    tables: Tables,
    labels: Labels,
    *,
    lambda_base: jax.Array | float = 0.0,
    objective: Objective = CROSS_ENTROPY,
) -> VocabularyLoss:
    """The definition: weighted losses of the corrected logits `U + E` and of the base logits `U`.

    Args:
        states: of the predictions, in the compute dtype.
        tables: the target's head, frozen, and the draft's expansion.
        labels: of the predictions; `target_states` are read where the objective has a `kl_weight`
            or a `cost`.
        lambda_base: weight of the base loss, 0..1, may be traced.
        objective: what a prediction costs.
    Returns:
        `VocabularyLoss`: sums, still to be divided (`objectives.DIVISORS`). Logits and sums
        are float32.
    """
    # The head is the target's: frozen here and never exported, so a gradient would go nowhere.
    lm_head = jax.lax.stop_gradient(tables.lm_head)
    # A target's scale and bound belong to its own product; the correction is added behind them.
    base_logits = objective.output_logits(head_logits(states.hidden, lm_head))
    final_logits = base_logits
    if states.low_rank is not None and tables.expansion is not None:
        final_logits = base_logits + head_logits(states.low_rank, tables.expansion)

    target_logits = None
    reads_target = objective.kl_weight > 0 or objective.cost is not None
    if labels.target_states is not None and reads_target:
        target_logits = objective.output_logits(head_logits(labels.target_states, lm_head))
        # Labels, not predictions: an objective may not lower its cost by moving them.
        target_logits = jax.lax.stop_gradient(target_logits)

    base_sum, base = _cost(base_logits, labels, target_logits, objective)
    final_sum, final = _cost(final_logits, labels, target_logits, objective)
    total = (1.0 - lambda_base) * final_sum + lambda_base * base_sum
    return VocabularyLoss(total, final_sum, base_sum, final, base)


def _cost(
    logits: jax.Array, labels: Labels, target_logits: jax.Array | None, objective: Objective
) -> tuple[jax.Array, TokenLoss]:
    """The weighted sum of one set of logits, and what they say of each label."""
    token = token_loss(logits, labels.target_ids, target_logits)
    if objective.cost is not None:
        # No divergence beside it, or `weighted_sum` would mix in what the cost has replaced.
        token = token._replace(nll=objective.cost(logits, labels, target_logits), divergence=None)
    return weighted_sum(token, labels, objective), token


class AcceptanceStats(NamedTuple):
    """Mean acceptance length, its sum over blocks and the number of non-empty blocks.

    The target's bonus token is included.
    """

    mean: jax.Array
    total: jax.Array
    blocks: jax.Array


def compute_accept_len(
    pred_ids: jax.Array, target_ids: jax.Array, valid_mask: jax.Array
) -> jax.Array:
    """Drafted tokens accepted before the first mismatch of each block.

    Args:
        pred_ids: int [B, N, M].
        target_ids: int [B, N, M].
        valid_mask: bool [B, N, M]; other positions neither end the prefix nor add to it.
    Returns:
        float32 [B, N].
    Source: NeMo AutoModel 0.7.0, `compute_accept_len`.

    >>> target = jnp.array([[[5, 6, 7], [5, 6, 7]]])
    >>> drafted = jnp.array([[[5, 6, 0], [0, 6, 7]]])
    >>> compute_accept_len(drafted, target, jnp.ones((1, 2, 3), bool)).tolist()
    [[2.0, 0.0]]
    """
    passes = (pred_ids == target_ids) | ~valid_mask
    accepted = jnp.cumprod(passes.astype(jnp.int32), axis=-1)
    return jnp.sum(accepted * valid_mask, axis=-1).astype(jnp.float32)


def acceptance_stats(
    pred_ids: jax.Array, target_ids: jax.Array, valid_mask: jax.Array
) -> AcceptanceStats:
    """Acceptance over blocks with at least one valid position.

    Each counts its accepted tokens plus the bonus token. Shapes as in `compute_accept_len`; three
    float32 scalars.
    Source: NeMo AutoModel 0.7.0, `compute_acceptance_stats`.
    """
    used = jnp.any(valid_mask, axis=-1)
    # A block that predicts nothing accepts nothing, but its bonus token alone would count as 1.
    with_bonus = compute_accept_len(pred_ids, target_ids, valid_mask) + 1.0
    total = jnp.sum(jnp.where(used, with_bonus, 0.0))
    blocks = jnp.sum(used.astype(jnp.float32))
    return AcceptanceStats(total / jnp.maximum(blocks, 1.0), total, blocks)
