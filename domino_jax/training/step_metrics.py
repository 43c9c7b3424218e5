"""What one pass over a batch measures, in the reference's names and by its rules."""

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.draft.blocks import Blocks
from domino_jax.kernels.token_loss import TokenLoss
from domino_jax.training.loss import acceptance_stats


class DFlashStepMetrics(flax.struct.PyTreeNode):
    """What one pass measured; all float32 scalars.

    Sums and counts add up over batches, means do not. `loss_weight` is the denominator of the loss,
    `valid_tokens` and `valid_blocks` count what was supervised, `accept_len` includes the target's
    bonus token.
    Source: NeMo AutoModel 0.7.0, `DFlashStepMetrics`.
    """

    loss: jax.Array
    loss_weight: jax.Array
    accuracy: jax.Array
    valid_tokens: jax.Array
    correct_tokens: jax.Array
    accept_len: jax.Array
    accept_len_sum: jax.Array
    valid_blocks: jax.Array


class DominoStepMetrics(DFlashStepMetrics):
    """`DFlashStepMetrics` of the corrected logits, with the base logits' figures beside them.

    `loss = (1 - lambda_base) * final_loss + lambda_base * base_loss`.
    Source: NeMo AutoModel 0.7.0, `DominoStepMetrics`.
    """

    final_loss: jax.Array
    base_loss: jax.Array
    base_accuracy: jax.Array
    base_correct_tokens: jax.Array
    base_accept_len: jax.Array
    base_accept_len_sum: jax.Array
    lambda_base: jax.Array


def prediction_metrics(token_loss: TokenLoss, blocks: Blocks) -> dict[str, jax.Array]:
    """What one set of logits got right, by the fields of `DFlashStepMetrics`; float32 scalars."""
    # As the reference treats a fractional mask: among the tokens it counts by its share, as right
    # above one half, and in a block as a token that is there.
    valid = jnp.sum(blocks.mask)
    right = (token_loss.prediction == blocks.target_ids) & (blocks.mask > 0.5)
    correct = jnp.sum(right.astype(jnp.float32))
    acceptance = acceptance_stats(token_loss.prediction, blocks.target_ids, blocks.mask > 0)
    return {
        "accuracy": correct / jnp.maximum(valid, 1.0),
        "valid_tokens": valid,
        "correct_tokens": correct,
        "accept_len": acceptance.mean,
        "accept_len_sum": acceptance.total,
        "valid_blocks": acceptance.blocks,
    }
