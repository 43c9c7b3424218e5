"""The trainer modules: a draft, its blocks, its loss and the reference's metrics behind one call.

Mask, labels, weights and metrics must all speak of the same anchors and the same shift. One that is
off by a token trains without an error and drafts badly, so they are made in one place:

    block position k       0         1        2        ..   K - 1
    token that is read     ids[a]    MASK     MASK     ..   MASK
    predicted, shifted     a + 1     a + 2    a + 3    ..   a + K        M = K predictions
    predicted, unshifted   -         a + 1    a + 2    ..   a + K - 1    M = K - 1

A head corrects logits that a backbone made, so both are supervised at the same predictions:

    hidden      [B, N, M, D]   of the backbone          -> base logits
    previous    [B, N, M, D]   tokens before, embedded  -> head -> low rank [B, N, M, R]
    final logits = base logits + low rank @ expansion^T, but for the first predictions
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from domino_jax.base.errors import require
from domino_jax.base.scopes import HEAD, VOCABULARY_LOSS
from domino_jax.config.model import DraftConfig
from domino_jax.config.sections import ANCHOR_RULES
from domino_jax.draft.backbone import DraftModel, output_logits
from domino_jax.draft.blocks import (
    Anchors,
    Blocks,
    Packing,
    anchor_candidates,
    make_blocks,
    sample_anchors,
)
from domino_jax.draft.mask import layer_spans
from domino_jax.kernels.chunked_cross_entropy import vocabulary_loss
from domino_jax.kernels.token_loss import Labels, Objective, States, Tables, VocabularyLoss
from domino_jax.objective.loss import dual_loss, position_weights
from domino_jax.objective.metrics import DFlashStepMetrics, DominoStepMetrics, prediction_metrics
from domino_jax.objective.objectives import (
    DIVISORS,
    check_objective,
    checked_options,
    objective_named,
    reads_target,
)
from domino_jax.sharding import constrain


class DFlashTrainerModule(nn.Module):
    """A draft and its block-wise loss, which a head splits into a final and a base loss.

    Attributes:
        draft_model: the draft; its parameters are the only ones.
        mask_token_id: id that stands for a token to be drafted.
        block_size: K.
        num_anchors: N, slots per row.
        loss_decay_gamma: decay of the position weights, None for none.
        loss_type: name of an objective (`objectives.py`).
        loss_options: the objective's own parameters, by name.
        normalize: divisor of the loss (see `DIVISORS`), None for the objective's own.
        kl_weight: share of the divergence from the target's distribution in each token's loss.
        anchor_rule: "nemo" or "specforge" (see `anchor_candidates`).
        chunk_blocks: memory bound of the vocabulary loss (see `vocabulary_loss`).
    Source: NeMo AutoModel 0.7.0, `DFlashTrainerModule`; the target's head and embedding are
        arguments of the call.
    """

    draft_model: DraftModel
    mask_token_id: int
    block_size: int = 16
    num_anchors: int = 512
    loss_decay_gamma: float | None = None
    loss_type: str = "dflash"
    loss_options: Mapping[str, Any] = FrozenDict()  # no dataclass takes a plain dict as default
    normalize: str | None = None
    kl_weight: float = 0.0
    anchor_rule: str = "nemo"
    chunk_blocks: int = 16

    def __post_init__(self) -> None:
        """Refuses what a run's config refuses, and fields that contradict the draft's config."""
        super().__post_init__()
        cfg = self.draft_model.cfg
        self._check_agreement("block_size", "mask_token_id")
        # The modules are public: what a run's config has checked, a script has not.
        rules = ", ".join(ANCHOR_RULES)
        require(
            self.anchor_rule in ANCHOR_RULES,
            f"anchor_rule must be one of {rules}, found {self.anchor_rule!r}",
        )
        require(0 <= self.kl_weight <= 1, f"kl_weight must lie in 0..1, found {self.kl_weight}")
        require(self.num_anchors >= 1, f"num_anchors must be at least 1, found {self.num_anchors}")
        require(
            self.chunk_blocks >= 0, f"chunk_blocks must be 0 or more, found {self.chunk_blocks}"
        )
        check_objective(
            self.loss_type,
            self.loss_options,
            normalize=self.normalize,
            gamma=self.loss_decay_gamma,
            kl_weight=self.kl_weight,
            domino=cfg.head is not None,
        )

    def _check_agreement(self, *names: str) -> None:
        """Refuses fields of the reference's modules that differ from the draft's config."""
        for name in names:
            here, there = getattr(self, name), getattr(self.draft_model.cfg, name)
            require(here == there, f"{name} is {here} here and {there} in the draft's config")

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
    ) -> DFlashStepMetrics:
        """Loss and metrics of a batch.

        Args:
            input_ids: int32 [B, S].
            hidden_states: [B, S, C*D], outputs of the captured target layers; no gradient flows
                into them.
            loss_mask: [B, S], True on supervised tokens; or their shares, 0..1: a label weighs by
                its share, and a block begins where it exceeds 0.5.
            lm_head: [V, D], the target's head, frozen.
            embed_tokens: [V, D], the target's embedding, frozen.
            lambda_base: weight of the base loss, 0..1, may be traced; without a head, whose
                base logits are the final ones, it changes nothing.
            position_ids: int32 [B, S], packed rows only, as are the next two: all three or none.
            seq_lens: int32 [B, documents].
            doc_remaining: int32 [B, S].
            anchor_positions: int32 [B, N]; drawn with the rng stream "anchors" when not given.
            block_keep_mask: bool [B, N], False for an unused slot; given with `anchor_positions`.
            target_states: [B, S, D], the target's states after its final norm; read with
                `kl_weight`, or where the objective reads the target's logits.
        Returns:
            `DominoStepMetrics` of a draft with a head, else `DFlashStepMetrics`. Without any anchor
            loss, gradient and `valid_blocks` are 0.
        Raises:
            ValueError: half of the packing or the anchors, or `kl_weight` without `target_states`.
        """
        draft = self.draft_model
        packing = _packing(position_ids, seq_lens, doc_remaining)
        anchors = self._anchors(loss_mask, packing, anchor_positions, block_keep_mask)
        prefix_lengths = self.draw_prefix_lengths(anchors.positions)
        blocks = make_blocks(
            input_ids,
            loss_mask,
            anchors,
            cfg=draft.cfg,
            packing=packing,
            prefix_lengths=prefix_lengths,
        )
        hidden = self._predictions(hidden_states, embed_tokens, blocks, anchors, packing)
        weights = position_weights(
            blocks.mask, gamma=self.loss_decay_gamma, prefix_lengths=prefix_lengths
        )
        low_rank = expansion = None
        if draft.cfg.head is None:
            lambda_base = 0.0  # its base logits are the final ones
        else:
            lambda_base = jnp.asarray(lambda_base, jnp.float32)  # it is returned among the metrics
            with jax.named_scope(HEAD):
                # Teacher-forced: the head reads the real tokens before, at inference drafted ones.
                previous = frozen_embeddings(embed_tokens, blocks.previous_ids)
                low_rank = draft.corrections(hidden, previous)
            expansion = draft.head.expansion
        label_states = self._label_states(target_states, anchors)
        loss = self._dual_loss(
            States(hidden, low_rank),
            Tables(lm_head, expansion),
            Labels(blocks.target_ids, blocks.mask, weights, label_states),
            lambda_base=lambda_base,
        )
        normalize = self.normalize or objective_named(self.loss_type).normalize
        weight = DIVISORS[normalize](weights, blocks.mask)
        if draft.cfg.head is None:
            # Plus 1e-6: a batch without anchors has the loss 0, and no NaN in its gradient.
            return DFlashStepMetrics(
                loss=loss.total / (weight + 1e-6),
                loss_weight=weight,
                **prediction_metrics(loss.final, blocks, correct_share=blocks.mask),
            )
        # Unlike plain DFlash, whose correct tokens add their shares (see `prediction_metrics`).
        correct_share = (blocks.mask > 0.5).astype(jnp.float32)
        base = prediction_metrics(loss.base, blocks, correct_share=correct_share)
        shared = ("accuracy", "correct_tokens", "accept_len", "accept_len_sum")
        return DominoStepMetrics(
            loss=loss.total / (weight + 1e-6),
            loss_weight=weight,
            **prediction_metrics(loss.final, blocks, correct_share=correct_share),
            final_loss=loss.final_sum / (weight + 1e-6),
            base_loss=loss.base_sum / (weight + 1e-6),
            **{f"base_{name}": base[name] for name in shared},
            lambda_base=lambda_base,
        )

    def draw_prefix_lengths(self, anchors: jax.Array) -> jax.Array | None:
        """Prefixes for blocks at the anchors, int32 [B, N] both.

        None where the objective shows the anchor alone.
        """
        draw = objective_named(self.loss_type).prefix_lengths
        if draw is None:
            return None
        options = checked_options(self.loss_type, self.loss_options)
        # The stream's next key: `_anchors` has used the one before, where it drew.
        return draw(self.make_rng("anchors"), anchors.shape, options, block_size=self.block_size)

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
            return Anchors(anchor_positions, block_keep_mask)
        candidates = anchor_candidates(
            loss_mask,
            block_size=self.block_size,
            doc_remaining=packing.doc_remaining if packing else None,
            rule=self.anchor_rule,
        )
        return sample_anchors(self.make_rng("anchors"), candidates, num_anchors=self.num_anchors)

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
        if packing:
            positions, seq_lens = packing.position_ids, packing.seq_lens
        else:
            positions, seq_lens = jnp.broadcast_to(jnp.arange(length), (batch, length)), None
        spans = layer_spans(self.draft_model.cfg, *anchors, seq_lens=seq_lens)
        noise = frozen_embeddings(embed_tokens, blocks.noise_ids)
        # The target is frozen, whoever ran it: no caller has to remember to cut its gradient off.
        features = jax.lax.stop_gradient(hidden_states)
        states = self.draft_model(features, positions, noise, blocks.positions, spans)
        return self.draft_model.prediction_states(states)

    def _label_states(self, target_states: jax.Array | None, anchors: Anchors) -> jax.Array | None:
        """The target's states that predict the labels, [B, S, D] -> [B, N, M, D].

        None where nothing reads them.
        """
        if self.kl_weight > 0 and target_states is None:
            raise ValueError(
                "kl_weight needs target_states, the target's states after its final norm"
            )
        if not reads_target(self.loss_type, kl_weight=self.kl_weight) or target_states is None:
            return None
        # The state at a position predicts the next token, so that of label a + 1 + m lies at a + m.
        index = anchors.positions[..., None] + jnp.arange(self.draft_model.cfg.num_predictions)
        # A block may reach over the end of its row; its labels there are masked.
        index = jnp.minimum(index, target_states.shape[1] - 1)
        return jax.vmap(lambda row, at: row[at])(target_states, index)

    @jax.named_scope(VOCABULARY_LOSS)
    def _dual_loss(
        self, states: States, tables: Tables, labels: Labels, *, lambda_base: jax.Array | float
    ) -> VocabularyLoss:
        entry = objective_named(self.loss_type)
        options = checked_options(self.loss_type, self.loss_options)
        # Options are bound here: the kernel calls an objective with arrays and knows no names.
        objective = Objective(
            factor=_with_options(entry.factor, options),
            kl_weight=self.kl_weight,
            output_logits=functools.partial(output_logits, self.draft_model.cfg),
            cost=_with_options(entry.cost, options),
        )
        chunked = functools.partial(vocabulary_loss, chunk_blocks=self.chunk_blocks)
        loss = chunked if objective.cost is None else dual_loss
        return loss(states, tables, labels, lambda_base=lambda_base, objective=objective)


class DominoTrainerModule(DFlashTrainerModule):
    """A draft with a head, for which `DFlashTrainerModule` weighs corrected and base logits.

    Attributes:
        shift_label: block position k predicts `anchor + 1 + k` instead of `anchor + k`; as in the
            draft's config.
    Source: NeMo AutoModel 0.7.0, `DominoTrainerModule`.
    """

    shift_label: bool = False

    def __post_init__(self) -> None:
        """Refuses a draft that does not fit."""
        super().__post_init__()
        head = self.draft_model.cfg.head
        require(
            head is not None, "DominoTrainerModule needs a draft with a head, found one without"
        )
        self._check_agreement("shift_label")


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


def _with_options(
    function: Callable[..., jax.Array] | None, options: Any
) -> Callable[..., jax.Array] | None:
    """A function of an objective with its last argument given."""
    return None if function is None else lambda *arguments: function(*arguments, options)


def _packing(
    position_ids: jax.Array | None, seq_lens: jax.Array | None, doc_remaining: jax.Array | None
) -> Packing | None:
    """The packing of a batch, None for rows of one document each; half of one is an error."""
    if position_ids is None and seq_lens is None and doc_remaining is None:
        return None
    if position_ids is None or seq_lens is None or doc_remaining is None:
        raise ValueError("packed rows need position_ids, seq_lens and doc_remaining together")
    return Packing(position_ids, seq_lens, doc_remaining)


def frozen_embeddings(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The target's embeddings of tokens, [V, D] and [B, N, x] -> [B, N, x, D], without gradient."""
    # Split by rows of the batch here: what follows would else be split like the table, and gathered
    # again.
    embeddings = jax.lax.stop_gradient(jnp.take(table, ids, axis=0))
    return constrain(embeddings, "batch", None, None, None)
