"""The trainer module of a draft with a head, and which module trains which draft.

A head corrects logits that a backbone made, so both are supervised at the same predictions:

    hidden      [B, N, M, D]   of the backbone          -> base logits
    previous    [B, N, M, D]   tokens before, embedded  -> head -> low rank [B, N, M, R]
    final logits = base logits + low rank @ expansion^T, but for the first predictions
"""

from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.base.scopes import HEAD
from domino_jax.config.model import DraftConfig
from domino_jax.draft.backbone import DraftModel
from domino_jax.kernels.token_loss import Labels, States, Tables
from domino_jax.objective.loss import position_weights
from domino_jax.objective.metrics import DominoStepMetrics, prediction_metrics
from domino_jax.objective.modules import DFlashTrainerModule, frozen_embeddings, packing_of


class DominoTrainerModule(DFlashTrainerModule):
    """A draft with the Domino head: one loss over corrected and base logits.

    Attributes:
        shift_label: block position k predicts `anchor + 1 + k` instead of `anchor + k`; as in the
            draft's config.
    Source: NeMo AutoModel 0.7.0, `DominoTrainerModule`.
    """

    shift_label: bool = False

    def __post_init__(self) -> None:
        """Refuses a draft that does not fit."""
        super().__post_init__()
        cfg = self.draft_model.cfg
        if cfg.head is None:
            raise ValueError("DominoTrainerModule needs a draft with a head, found one without")
        if cfg.shift_label != self.shift_label:
            raise ValueError(
                f"shift_label is {self.shift_label} here and {cfg.shift_label} in the draft's "
                "config"
            )

    def __call__(
        self,
        input_ids: jax.Array,
        hidden_states: jax.Array,
        loss_mask: jax.Array,
        lm_head: jax.Array,
        embed_tokens: jax.Array,
        *,
        lambda_base: jax.Array | float = 0.0,
        position_ids: jax.Array | None = None,
        seq_lens: jax.Array | None = None,
        doc_remaining: jax.Array | None = None,
        anchor_positions: jax.Array | None = None,
        block_keep_mask: jax.Array | None = None,
        target_states: jax.Array | None = None,
    ) -> DominoStepMetrics:
        """Loss and metrics of a batch.

        Arguments and errors as in `DFlashTrainerModule.__call__`, whose base logits are the final
        ones; here `lambda_base` weighs the two losses.
        """
        packing = packing_of(position_ids, seq_lens, doc_remaining)
        anchors = self._anchors(loss_mask, packing, anchor_positions, block_keep_mask)
        blocks = self._blocks(input_ids, loss_mask, anchors, packing)
        hidden = self._predictions(hidden_states, embed_tokens, blocks, anchors, packing)
        weights = position_weights(blocks.mask, gamma=self.loss_decay_gamma)
        lambda_base = jnp.asarray(lambda_base, jnp.float32)  # it is returned among the metrics
        with jax.named_scope(HEAD):
            # Teacher-forced: the head reads the real tokens before, at inference the drafted ones.
            previous = frozen_embeddings(embed_tokens, blocks.previous_ids)
            low_rank = self.draft_model.corrections(hidden, previous)
        label_states = self._label_states(target_states, anchors)
        labels = Labels(blocks.target_ids, blocks.mask, weights, label_states)
        loss = self._dual_loss(
            States(hidden, low_rank),
            Tables(lm_head, self.draft_model.head.expansion),
            labels,
            lambda_base=lambda_base,
        )
        divisor = self._divisor(weights, blocks)
        # Unlike plain DFlash, whose correct tokens add their shares (see `prediction_metrics`).
        correct_share = (blocks.mask > 0.5).astype(jnp.float32)
        base_metrics = prediction_metrics(loss.base, blocks, correct_share=correct_share)
        return DominoStepMetrics(
            loss=loss.total / (divisor + 1e-6),
            loss_weight=divisor,
            **prediction_metrics(loss.final, blocks, correct_share=correct_share),
            final_loss=loss.final_sum / (divisor + 1e-6),
            base_loss=loss.base_sum / (divisor + 1e-6),
            base_accuracy=base_metrics["accuracy"],
            base_correct_tokens=base_metrics["correct_tokens"],
            base_accept_len=base_metrics["accept_len"],
            base_accept_len_sum=base_metrics["accept_len_sum"],
            lambda_base=lambda_base,
        )


def build_trainer(
    config: DraftConfig,
    *,
    num_anchors: int = 512,
    loss_decay_gamma: float | None = None,
    recompute: bool = False,
    **options: Any,
) -> DFlashTrainerModule:
    """The trainer module of a draft config.

    `DominoTrainerModule`, or `DFlashTrainerModule` without projector. Its variables are
    `{"params": {"draft_model": params}}`, with `params` as `load_hf_draft` returns them.

    Args:
        config: the draft.
        num_anchors: N.
        loss_decay_gamma: decay of the position weights, None for none.
        recompute: as in `DraftModel`.
        options: further fields of the module.
    """
    draft = DraftModel(config, recompute)
    # The config's own, and no options: given twice, each of them is an error.
    options = dict(mask_token_id=config.mask_token_id, block_size=config.block_size, **options)
    options.update(num_anchors=num_anchors, loss_decay_gamma=loss_decay_gamma)
    if config.head is not None:
        return DominoTrainerModule(draft, shift_label=config.shift_label, **options)
    return DFlashTrainerModule(draft, **options)
