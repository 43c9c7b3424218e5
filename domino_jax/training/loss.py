"""The dual cross-entropy over the vocabulary, in pieces that bound its memory, and the acceptance statistics."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.sharding import constrain
from domino_jax.target.model import most_likely, vocabulary_logits


class TokenLoss(NamedTuple):
    """What the logits of each prediction say of its label, all [...].

    `nll` float32 is the negative log-likelihood, `prediction` int32 the most likely token, `divergence` float32
    KL(target || draft), None where the target's states were not given.
    """

    nll: jax.Array
    prediction: jax.Array
    divergence: jax.Array | None = None


class VocabularyLoss(NamedTuple):
    """Weighted sums over all predictions, float32 scalars, and what they were made of, [B, N, M].

    `total = (1 - lambda_base) * final_sum + lambda_base * base_sum` alone carries a gradient. Without a head final and
    base are the same.
    """

    total: jax.Array
    final_sum: jax.Array
    base_sum: jax.Array
    final: TokenLoss
    base: TokenLoss


class AcceptanceStats(NamedTuple):
    """Mean acceptance length (bonus token included), its sum over blocks and the number of non-empty blocks."""

    mean: jax.Array
    total: jax.Array
    blocks: jax.Array


class Objective(NamedTuple):
    """What a token's loss is and how much it weighs.

    `factor(token_loss, target_ids, mask)` multiplies the position weights, float32 [B, n, M] over whole blocks; no
    gradient flows through it. `kl_weight` of each token's loss is the divergence, the rest cross-entropy.
    `output_logits` is what the target's head makes of its product, elementwise, before the correction is added.
    """

    factor: Callable[[TokenLoss, jax.Array, jax.Array], jax.Array] = lambda loss, ids, mask: jnp.ones_like(loss.nll)
    kl_weight: float = 0.0
    output_logits: Callable[[jax.Array], jax.Array] = lambda logits: logits


CROSS_ENTROPY = Objective()


class _Inputs(NamedTuple):
    """Per prediction of a piece, [B, n, M] and, for the states, [B, n, M, D]; None without divergence."""

    target_ids: jax.Array
    mask: jax.Array
    weights: jax.Array
    target_states: jax.Array | None


class _Gradients(NamedTuple):
    """Of `hidden` and `low_rank`, like them, and of `expansion`, [R, V], without the labels' part.

    That part is a row of `low_rank` per prediction, times `labelled` [B, n, M].
    """

    hidden: jax.Array | None = None
    low_rank: jax.Array | None = None
    expansion: jax.Array | None = None
    labelled: jax.Array | None = None


class _Softmax(NamedTuple):
    """Logits and their softmax, not yet divided by its sum: `exps` [..., V], `sums` and `largest` [...]."""

    logits: jax.Array
    exps: jax.Array
    sums: jax.Array
    largest: jax.Array

    @classmethod
    def of(cls, logits: jax.Array) -> "_Softmax":
        largest = jnp.max(logits, axis=-1)
        exps = jnp.exp(logits - largest[..., None])
        return cls(logits, exps, jnp.sum(exps, axis=-1), largest)

    def loss(self, ids: jax.Array, wanted: "_Softmax | None") -> TokenLoss:
        log_sum = self.largest + jnp.log(self.sums)
        divergence = None
        if wanted is not None:
            apart = jnp.sum(wanted.exps * (wanted.logits - self.logits), axis=-1) / wanted.sums
            divergence = apart - (wanted.largest + jnp.log(wanted.sums)) + log_sum
        return TokenLoss(log_sum - _at(self.logits, ids), most_likely(self.logits), divergence)

    def slope(self, weights: jax.Array, wanted: "_Softmax | None", kl: float) -> tuple[jax.Array, jax.Array]:
        """The gradient without the labels' part: [..., V], and the factor of each row, not multiplied in yet."""
        if wanted is None:
            return self.exps, weights / self.sums
        return self.exps / self.sums[..., None] - kl * wanted.exps / wanted.sums[..., None], weights


def vocabulary_loss(
    hidden: jax.Array,
    target_ids: jax.Array,
    *,
    mask: jax.Array,
    weights: jax.Array,
    lm_head: jax.Array,
    low_rank: jax.Array | None = None,
    expansion: jax.Array | None = None,
    lambda_base: jax.Array | float = 0.0,
    target_states: jax.Array | None = None,
    objective: Objective = CROSS_ENTROPY,
    chunk_blocks: int = 0,
) -> VocabularyLoss:
    """Losses of the corrected logits `U + E` and of the base logits `U`, in one pass over the vocabulary.

    The gradient is made in the same pass as the loss, piece by piece, so that logits are never kept or made again.
    The pieces after the last supervised prediction are left out: unused slots come last.

    Args:
        hidden: [B, N, M, D], backbone states of the predictions.
        target_ids: int32 [B, N, M].
        mask: bool [B, N, M], supervised predictions.
        weights: float32 [B, N, M], 0 outside the mask.
        lm_head: [V, D], frozen.
        low_rank: [B, N, M, R], the head's states, zero where the logits stay uncorrected; None without a head.
        expansion: [V, R], the head's last product.
        lambda_base: weight of the base loss, may be traced.
        target_states: [B, N, M, D], the target's states after its final norm that predict the same tokens; read with
            a `kl_weight` only.
        objective: `Objective`.
        chunk_blocks: blocks whose logits exist at the same time, 0 for all.
    Returns:
        `VocabularyLoss`. Logits, log-sum-exp and sums are float32; gradients reach `hidden`, `low_rank` and
        `expansion` through `total`. What is said of predictions outside the mask means nothing.
    """
    if objective.kl_weight == 0:
        target_states = None
    inputs = _Inputs(target_ids, mask, weights, target_states)
    return _vocabulary_loss(
        (objective, chunk_blocks),
        (hidden, low_rank, expansion),
        jax.lax.stop_gradient(lm_head),
        inputs,
        jnp.asarray(lambda_base, jnp.float32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vocabulary_loss(static: Any, trained: Any, lm_head: jax.Array, inputs: _Inputs, lam: jax.Array) -> VocabularyLoss:
    return _in_pieces(static, trained, lm_head, inputs, lam, with_gradient=False)[0]


def _forward(static: Any, trained: Any, lm_head: jax.Array, inputs: _Inputs, lam: jax.Array) -> tuple[Any, Any]:
    return _in_pieces(static, trained, lm_head, inputs, lam, with_gradient=True)


def _backward(_: Any, gradients: Any, cotangent: VocabularyLoss) -> tuple[Any, ...]:
    return jax.tree.map(lambda g: g * cotangent.total.astype(g.dtype), gradients), None, None, None


_vocabulary_loss.defvjp(_forward, _backward)


def _in_pieces(
    static: tuple[Objective, int],
    trained: tuple[jax.Array, jax.Array | None, jax.Array | None],
    lm_head: jax.Array,
    inputs: _Inputs,
    lam: jax.Array,
    *,
    with_gradient: bool,
) -> tuple[VocabularyLoss, Any]:
    """The loss and the gradients of `trained`, one piece of blocks after the other."""
    objective, chunk_blocks = static
    hidden, low_rank, expansion = trained
    lm_head = lm_head.astype(hidden.dtype)  # once, not in every piece
    expansion = None if expansion is None else expansion.astype(hidden.dtype)
    piece = functools.partial(
        _piece, objective=objective, lm_head=lm_head, expansion=expansion, lam=lam, with_gradient=with_gradient
    )
    blocks = hidden.shape[1]
    if chunk_blocks == 0 or chunk_blocks >= blocks:
        loss, gradients = piece(hidden, low_rank, inputs)
        return loss, _with_labels(gradients, low_rank, inputs.target_ids)
    pieces = -(-blocks // chunk_blocks)

    def split(x: jax.Array) -> jax.Array:  # [B, N, ...] -> [pieces, B, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, pieces * chunk_blocks - blocks)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], pieces, chunk_blocks, *x.shape[2:]).swapaxes(0, 1)

    def joined(x: jax.Array) -> jax.Array:  # and back
        return x.swapaxes(0, 1).reshape(x.shape[1], pieces * chunk_blocks, *x.shape[3:])[:, :blocks]

    def one(rows: Any) -> tuple[Any, Any]:
        loss, gradients = piece(*rows)
        sums = (loss.total, loss.final_sum, loss.base_sum, gradients.expansion)
        return sums, (loss.final, loss.base, gradients._replace(expansion=None))

    def add(index: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        new, out = one(jax.tree.map(lambda x: x[index], rows))
        outs = jax.tree.map(lambda whole, x: whole.at[index].set(x), carry[1], out)
        return jax.tree.map(jnp.add, carry[0], new), outs

    rows = jax.tree.map(split, (hidden, low_rank, inputs))
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], rows))
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0])
    outs = jax.tree.map(lambda x: jnp.zeros((pieces, *x.shape), x.dtype), shapes[1])
    supervised = jnp.any(rows[2].mask, axis=(1, 2, 3))
    needed = jnp.max(jnp.where(supervised, jnp.arange(1, pieces + 1), 0))
    (total, final_sum, base_sum, expanded), outs = jax.lax.fori_loop(0, needed, add, (sums, outs))
    final, base, gradients = jax.tree.map(joined, outs)
    loss = VocabularyLoss(total, final_sum, base_sum, final, base)
    return loss, _with_labels(gradients._replace(expansion=expanded), low_rank, inputs.target_ids)


def _with_labels(gradients: _Gradients, low_rank: jax.Array | None, ids: jax.Array) -> tuple[Any, ...]:
    """The gradients of states, low rank and expansion [V, R], to which the labels' part is added here, once for all."""
    expansion = gradients.expansion
    if expansion is not None and low_rank is not None and gradients.labelled is not None:
        expansion = jax.lax.optimization_barrier(expansion).T  # or XLA would turn the product round again
        expansion = expansion.at[ids].add(-gradients.labelled[..., None] * low_rank)
    return gradients.hidden, gradients.low_rank, expansion


def _piece(
    hidden: jax.Array,
    low_rank: jax.Array | None,
    inputs: _Inputs,
    *,
    objective: Objective,
    lm_head: jax.Array,
    expansion: jax.Array | None,
    lam: jax.Array,
    with_gradient: bool,
) -> tuple[VocabularyLoss, _Gradients]:
    """Loss and gradients of blocks whose logits fit in memory."""
    ids, kl = inputs.target_ids, objective.kl_weight
    product = _logits(hidden, lm_head)
    base_logits, pull = jax.vjp(objective.output_logits, product)
    wanted = None
    if inputs.target_states is not None:
        wanted = _Softmax.of(objective.output_logits(_logits(inputs.target_states, lm_head)))
    base = final = _Softmax.of(base_logits)
    if low_rank is not None and expansion is not None:
        final = _Softmax.of(base_logits + _logits(low_rank, expansion))
    base_loss, final_loss = base.loss(ids, wanted), final.loss(ids, wanted)
    base_sum, base_weights = _weighted(base_loss, inputs, objective)
    final_sum, final_weights = _weighted(final_loss, inputs, objective)
    loss = VocabularyLoss((1.0 - lam) * final_sum + lam * base_sum, final_sum, base_sum, final_loss, base_loss)
    if not with_gradient:
        return loss, _Gradients()

    # A logit's gradient is `weight * (softmax - label)`. The label part is a row of the table per prediction. Of the
    # softmax parts the corrected one is scaled outside its products, and both are added up for that with the head.
    base_weights, final_weights = lam * base_weights, (1.0 - lam) * final_weights
    labelled = (1.0 - kl) * (base_weights + final_weights)
    dense, scale = final.slope(final_weights, wanted, kl)
    dense_base, scale_base = base.slope(base_weights, wanted, kl)
    (slope,) = pull(scale[..., None] * dense + scale_base[..., None] * dense_base)
    (labelled,) = jax.vjp(objective.output_logits, _at(product, ids))[1](labelled)
    hidden_gradient = _states_gradient(slope.astype(hidden.dtype), jnp.ones_like(scale), lm_head, labelled, ids)
    if low_rank is None or expansion is None:
        return loss, _Gradients(hidden_gradient)
    dense, labelled = dense.astype(low_rank.dtype), (1.0 - kl) * final_weights
    low_rank_gradient = _states_gradient(dense, scale, expansion, labelled, ids)
    rows = (scale[..., None] * low_rank).astype(low_rank.dtype)
    # [R, V]: the other way round the large factor would be transposed first.
    expansion_gradient = jnp.einsum("bnmr,bnmv->rv", rows, dense, preferred_element_type=jnp.float32)
    return loss, _Gradients(hidden_gradient, low_rank_gradient, expansion_gradient, labelled)


def _weighted(loss: TokenLoss, inputs: _Inputs, objective: Objective) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of a piece and the weight of each prediction."""
    values = loss.nll
    if loss.divergence is not None:
        values = (1.0 - objective.kl_weight) * values + objective.kl_weight * loss.divergence
    weights = inputs.weights * objective.factor(loss, inputs.target_ids, inputs.mask)
    return jnp.sum(values * weights), weights


def _states_gradient(
    dense: jax.Array, scale: jax.Array, table: jax.Array, labelled: jax.Array, ids: jax.Array
) -> jax.Array:
    products = jnp.einsum("...v,vd->...d", dense, table, preferred_element_type=jnp.float32)
    return (scale[..., None] * products - labelled[..., None] * table[ids]).astype(dense.dtype)


def _logits(states: jax.Array, table: jax.Array) -> jax.Array:
    return constrain(vocabulary_logits(states, table), "batch", None, None, "vocab")


def _at(logits: jax.Array, ids: jax.Array) -> jax.Array:  # [..., V], [...] -> [...]
    return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]


def compute_accept_len(pred_ids: jax.Array, target_ids: jax.Array, valid_mask: jax.Array) -> jax.Array:
    """Drafted tokens accepted before the first mismatch of each block.

    Args:
        pred_ids: int [B, N, M].
        target_ids: int [B, N, M].
        valid_mask: bool [B, N, M]; other positions neither end the prefix nor add to it.
    Returns:
        float32 [B, N].
    Source: NeMo AutoModel 0.7.0, `compute_accept_len`.
    """
    accepted = jnp.cumprod(((pred_ids == target_ids) | ~valid_mask).astype(jnp.int32), axis=-1)
    return jnp.sum(accepted * valid_mask, axis=-1).astype(jnp.float32)


def acceptance_stats(pred_ids: jax.Array, target_ids: jax.Array, valid_mask: jax.Array) -> AcceptanceStats:
    """Acceptance over blocks with at least one valid position; each counts its accepted tokens plus the bonus token.

    Shapes as in `compute_accept_len`; three float32 scalars.
    Source: NeMo AutoModel 0.7.0, `compute_acceptance_stats`.
    """
    used = jnp.any(valid_mask, axis=-1)
    total = jnp.sum(jnp.where(used, compute_accept_len(pred_ids, target_ids, valid_mask) + 1.0, 0.0))
    blocks = jnp.sum(used.astype(jnp.float32))
    return AcceptanceStats(total / jnp.maximum(blocks, 1.0), total, blocks)
