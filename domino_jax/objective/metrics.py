"""What one pass over a batch measures, in the reference's names and by its rules."""

import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.draft.blocks import Blocks
from domino_jax.kernels.token_loss import TokenLoss
from domino_jax.objective.loss import acceptance_stats


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


def prediction_metrics(
    token_loss: TokenLoss, blocks: Blocks, *, correct_share: jax.Array
) -> dict[str, jax.Array]:
    """Accuracy and acceptance of one set of logits, by the fields of `DFlashStepMetrics`.

    A fractional mask counts in `valid_tokens` by its share. An accepted prefix has a whole number
    of tokens, so `accept_len` thresholds the mask: every share above 0 is a token, as in NeMo.

    Args:
        token_loss: predictions of the logits, [B, N, M].
        blocks: labels and their mask.
        correct_share: float32 [B, N, M], added to `correct_tokens` by a correct prediction:
            `blocks.mask` in plain DFlash and `variable_prefix`; in Domino 1 where the mask exceeds
            0.5. NeMo 0.7.0 differs in this between its two trainers.
    Returns:
        Float32 scalars.
    """
    valid = jnp.sum(blocks.mask)
    correct = jnp.sum((token_loss.prediction == blocks.target_ids) * correct_share)
    acceptance = acceptance_stats(token_loss.prediction, blocks.target_ids, blocks.mask > 0)
    return {
        "accuracy": correct / jnp.maximum(valid, 1.0),
        "valid_tokens": valid,
        "correct_tokens": correct,
        "accept_len": acceptance.mean,
        "accept_len_sum": acceptance.total,
        "valid_blocks": acceptance.blocks,
    }
