"""The trainer modules: a draft, its blocks and its loss behind one call, with the reference's metrics."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from domino_jax.draft.backbone import DraftModel, output_logits
from domino_jax.draft.blocks import (
    Blocks,
    Packing,
    anchor_candidates,
    make_blocks,
    position_weights,
    sample_anchors,
    sample_prefix_lengths,
)
from domino_jax.draft.mask import layer_spans
from domino_jax.model_config import DraftConfig
from domino_jax.training.loss import Objective, TokenLoss, VocabularyLoss, acceptance_stats, vocabulary_loss
from domino_jax.training.objectives import OBJECTIVES, loss_divisor

Anchors = tuple[jax.Array, jax.Array]  # positions int32 [B, N] and which slots hold one, bool [B, N]


class DFlashStepMetrics(flax.struct.PyTreeNode):
    """What one pass measured; all float32 scalars. Sums and counts add up over batches, means do not.

    `loss_weight` is the denominator of the loss, `valid_tokens` and `valid_blocks` count what was supervised,
    `accept_len` includes the target's bonus token.
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
    """`DFlashStepMetrics` of the corrected logits, with the same figures of the base logits beside them.

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


class DFlashTrainerModule(nn.Module):
    """A DFlash draft and its block-wise loss.

    Attributes:
        draft_model: the draft; its parameters are the only ones.
        mask_token_id: id that stands for a token to be drafted.
        block_size: K.
        num_anchors: N, slots per row.
        loss_decay_gamma: decay of the position weights, None for none.
        loss_type: a row of `OBJECTIVES`.
        prefix_weight_base: of "variable_prefix" (see `sample_prefix_lengths`).
        dpace_alpha: smoothing of the "dpace" rows.
        normalize: divisor of the loss (see `loss_divisor`), None for the row's own.
        kl_weight: share of the divergence from the target's distribution in each token's loss.
        anchor_rule: "nemo" or "specforge" (see `anchor_candidates`).
        chunk_blocks: memory bound of the vocabulary loss (see `vocabulary_loss`).
    Source: NeMo AutoModel 0.7.0, `DFlashTrainerModule`; the target's head and embedding are arguments of the call.
    """

    draft_model: DraftModel
    mask_token_id: int
    block_size: int = 16
    num_anchors: int = 512
    loss_decay_gamma: float | None = None
    loss_type: str = "dflash"
    prefix_weight_base: float = 0.9
    dpace_alpha: float = 0.5
    normalize: str | None = None
    kl_weight: float = 0.0
    anchor_rule: str = "nemo"
    chunk_blocks: int = 16

    def __post_init__(self) -> None:
        """Refuses an objective that does not exist."""
        super().__post_init__()
        if self.loss_type not in OBJECTIVES:
            raise ValueError(f"loss_type must be one of {', '.join(OBJECTIVES)}, found {self.loss_type!r}")

    def __call__(
        self,
        input_ids: jax.Array,
        hidden_states: jax.Array,
        loss_mask: jax.Array,
        lm_head: jax.Array,
        embed_tokens: jax.Array,
        *,
        position_ids: jax.Array | None = None,
        seq_lens: jax.Array | None = None,
        doc_remaining: jax.Array | None = None,
        anchor_positions: jax.Array | None = None,
        block_keep_mask: jax.Array | None = None,
        target_states: jax.Array | None = None,
    ) -> DFlashStepMetrics:
        """Loss and metrics of a batch; arguments as in `DominoTrainerModule.__call__`, without `lambda_base`."""
        packing = _packing(position_ids, seq_lens, doc_remaining)
        anchors = self._anchors(loss_mask, packing, anchor_positions, block_keep_mask)
        prefix_lengths = self.draw_prefix_lengths(anchors[0]) if self.loss_type == "variable_prefix" else None
        blocks = self._blocks(input_ids, loss_mask, anchors, packing, prefix_lengths=prefix_lengths)
        hidden = self._predictions(hidden_states, embed_tokens, blocks, anchors, packing)
        weights = position_weights(blocks.mask, gamma=self.loss_decay_gamma, prefix_lengths=prefix_lengths)
        loss = self._vocabulary_loss(hidden, blocks, weights, lm_head, anchors, target_states=target_states)
        divisor = self._divisor(weights, blocks)
        return DFlashStepMetrics(
            loss=loss.total / (divisor + 1e-6), loss_weight=divisor, **_prediction_metrics(loss.final, blocks)
        )

    def draw_prefix_lengths(self, anchors: jax.Array) -> jax.Array:
        """Prefixes for blocks at the anchors, int32 [B, N] both, drawn with the rng stream "anchors"."""
        return sample_prefix_lengths(
            self.make_rng("anchors"), anchors.shape, block_size=self.block_size, weight_base=self.prefix_weight_base
        )

    def _anchors(
        self,
        loss_mask: jax.Array,
        packing: Packing | None,
        anchor_positions: jax.Array | None,
        block_keep_mask: jax.Array | None,
    ) -> Anchors:
        if (anchor_positions is None) != (block_keep_mask is None):
            raise ValueError("give anchor_positions and block_keep_mask together, or neither")
        if anchor_positions is not None and block_keep_mask is not None:
            return anchor_positions, block_keep_mask
        candidates = anchor_candidates(
            loss_mask,
            block_size=self.block_size,
            doc_remaining=packing.doc_remaining if packing else None,
            rule=self.anchor_rule,
        )
        return sample_anchors(self.make_rng("anchors"), candidates, num_anchors=self.num_anchors)

    def _blocks(
        self,
        input_ids: jax.Array,
        loss_mask: jax.Array,
        anchors: Anchors,
        packing: Packing | None,
        *,
        prefix_lengths: jax.Array | None = None,
    ) -> Blocks:
        return make_blocks(
            input_ids,
            loss_mask,
            *anchors,
            block_size=self.block_size,
            mask_token_id=self.mask_token_id,
            shift_label=self.draft_model.cfg.shift_label,
            packing=packing,
            prefix_lengths=prefix_lengths,
        )

    def _predictions(
        self,
        hidden_states: jax.Array,
        embed_tokens: jax.Array,
        blocks: Blocks,
        anchors: Anchors,
        packing: Packing | None,
    ) -> jax.Array:
        """The backbone's states of the blocks' predictions, [B, N, M, D]."""
        batch, length = hidden_states.shape[:2]
        positions = packing.position_ids if packing else jnp.broadcast_to(jnp.arange(length), (batch, length))
        spans = layer_spans(self.draft_model.cfg, *anchors, seq_lens=packing.seq_lens if packing else None)
        noise = _frozen_rows(embed_tokens, blocks.noise_ids)
        states = self.draft_model(jax.lax.stop_gradient(hidden_states), positions, noise, blocks.positions, spans)
        return self.draft_model.prediction_states(states)

    def _wanted_states(self, target_states: jax.Array | None, anchors: Anchors) -> jax.Array | None:
        """The target's states that predict the labels, [B, S, D] -> [B, N, M, D]; None where no divergence is asked."""
        if self.kl_weight == 0:
            return None
        if target_states is None:
            raise ValueError("kl_weight needs target_states, the target's states after its final norm")
        index = anchors[0][..., None] + jnp.arange(self.draft_model.cfg.num_predictions)
        index = jnp.minimum(index, target_states.shape[1] - 1)
        return jax.vmap(lambda row, at: row[at])(target_states, index)

    def _divisor(self, weights: jax.Array, blocks: Blocks) -> jax.Array:
        normalize = self.normalize or OBJECTIVES[self.loss_type].normalize
        return loss_divisor(weights, blocks.mask, normalize=normalize)

    def _vocabulary_loss(
        self,
        hidden: jax.Array,
        blocks: Blocks,
        weights: jax.Array,
        lm_head: jax.Array,
        anchors: Anchors,
        *,
        target_states: jax.Array | None,
        **head: Any,
    ) -> VocabularyLoss:
        factor, cfg = OBJECTIVES[self.loss_type].factor, self.draft_model.cfg
        objective = Objective(
            factor=lambda loss, ids, mask: factor(loss, ids, mask, self.dpace_alpha),
            kl_weight=self.kl_weight,
            output_logits=lambda logits: output_logits(cfg, logits),
        )
        return vocabulary_loss(
            hidden,
            blocks.target_ids,
            mask=blocks.mask,
            weights=weights,
            lm_head=lm_head,
            target_states=self._wanted_states(target_states, anchors),
            objective=objective,
            chunk_blocks=self.chunk_blocks,
            **head,
        )


class DominoTrainerModule(DFlashTrainerModule):
    """A draft with the Domino head: one loss over corrected and base logits.

    Attributes:
        shift_label: block position k predicts `anchor + 1 + k` instead of `anchor + k`; as in the draft's config.
    Source: NeMo AutoModel 0.7.0, `DominoTrainerModule`.
    """

    shift_label: bool = False

    def __post_init__(self) -> None:
        """Refuses a draft that does not fit."""
        super().__post_init__()
        cfg = self.draft_model.cfg
        if cfg.projector_type != "domino":
            raise ValueError(f"DominoTrainerModule needs projector_type 'domino', found {cfg.projector_type!r}")
        if cfg.shift_label != self.shift_label:
            raise ValueError(f"shift_label is {self.shift_label} here and {cfg.shift_label} in the draft's config")
        if self.loss_type == "variable_prefix":
            raise ValueError("loss_type 'variable_prefix' is for plain DFlash drafts")

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

        Args:
            input_ids: int32 [B, S].
            hidden_states: [B, S, C*D], outputs of the captured target layers; no gradient flows into them.
            loss_mask: [B, S], True (or above 0.5) on supervised tokens.
            lm_head: [V, D], the target's head, frozen.
            embed_tokens: [V, D], the target's embedding, frozen.
            lambda_base: weight of the base loss, 0..1, may be traced.
            position_ids: int32 [B, S], packed rows only, as are the next two, which come all three or not at all.
            seq_lens: int32 [B, documents].
            doc_remaining: int32 [B, S].
            anchor_positions: int32 [B, N]; drawn with the rng stream "anchors" when not given.
            block_keep_mask: bool [B, N], False for an unused slot; given together with `anchor_positions`.
            target_states: [B, S, D], the target's states after its final norm; read with `kl_weight` only.
        Returns:
            `DominoStepMetrics`. A batch without any anchor has loss 0, no gradient and `valid_blocks` 0.
        Raises:
            ValueError: half of the packing or of the anchors is given, or `kl_weight` without `target_states`.
        """
        packing = _packing(position_ids, seq_lens, doc_remaining)
        anchors = self._anchors(loss_mask, packing, anchor_positions, block_keep_mask)
        blocks = self._blocks(input_ids, loss_mask, anchors, packing)
        hidden = self._predictions(hidden_states, embed_tokens, blocks, anchors, packing)
        head = self.draft_model.head
        weights = position_weights(blocks.mask, gamma=self.loss_decay_gamma)
        lambda_base = jnp.asarray(lambda_base, jnp.float32)
        loss = self._vocabulary_loss(
            hidden,
            blocks,
            weights,
            lm_head,
            anchors,
            target_states=target_states,
            low_rank=head(hidden, _frozen_rows(embed_tokens, blocks.previous_ids)),
            expansion=head.expansion,
            lambda_base=lambda_base,
        )
        divisor = self._divisor(weights, blocks)
        base_metrics = _prediction_metrics(loss.base, blocks)
        return DominoStepMetrics(
            loss=loss.total / (divisor + 1e-6),
            loss_weight=divisor,
            **_prediction_metrics(loss.final, blocks),
            final_loss=loss.final_sum / (divisor + 1e-6),
            base_loss=loss.base_sum / (divisor + 1e-6),
            base_accuracy=base_metrics["accuracy"],
            base_correct_tokens=base_metrics["correct_tokens"],
            base_accept_len=base_metrics["accept_len"],
            base_accept_len_sum=base_metrics["accept_len_sum"],
            lambda_base=lambda_base,
        )


def build_trainer(
    config: DraftConfig, *, num_anchors: int = 512, loss_decay_gamma: float | None = None, **options: Any
) -> DFlashTrainerModule:
    """The trainer module of a draft config: `DominoTrainerModule`, or `DFlashTrainerModule` without projector.

    Its variables are `{"params": {"draft_model": params}}`, with `params` as `load_hf_draft` returns them.

    Args:
        config: the draft.
        num_anchors: N.
        loss_decay_gamma: decay of the position weights, None for none.
        options: further fields of the module.
    """
    options.update(mask_token_id=config.mask_token_id, block_size=config.block_size)
    options.update(num_anchors=num_anchors, loss_decay_gamma=loss_decay_gamma)
    if config.projector_type == "domino":
        return DominoTrainerModule(DraftModel(config), shift_label=config.shift_label, **options)
    return DFlashTrainerModule(DraftModel(config), **options)


def _packing(
    position_ids: jax.Array | None, seq_lens: jax.Array | None, doc_remaining: jax.Array | None
) -> Packing | None:
    if position_ids is None and seq_lens is None and doc_remaining is None:
        return None
    if position_ids is None or seq_lens is None or doc_remaining is None:
        raise ValueError("packed rows need position_ids, seq_lens and doc_remaining together")
    return Packing(position_ids, seq_lens, doc_remaining)


def _frozen_rows(table: jax.Array, ids: jax.Array) -> jax.Array:  # [V, D], [...] -> [..., D]
    return jax.lax.stop_gradient(jnp.take(table, ids, axis=0))


def _prediction_metrics(token_loss: TokenLoss, blocks: Blocks) -> dict[str, jax.Array]:
    valid = jnp.sum(blocks.mask.astype(jnp.float32))
    correct = jnp.sum(((token_loss.prediction == blocks.target_ids) & blocks.mask).astype(jnp.float32))
    acceptance = acceptance_stats(token_loss.prediction, blocks.target_ids, blocks.mask)
    return {
        "accuracy": correct / jnp.maximum(valid, 1.0),
        "valid_tokens": valid,
        "correct_tokens": correct,
        "accept_len": acceptance.mean,
        "accept_len_sum": acceptance.total,
        "valid_blocks": acceptance.blocks,
    }
