"""Chunked linear cross-entropy of two logits over one vocabulary.

Logits of [V] for each of N*K predictions are 5.0 GB a row in float32 (N 512, K 16, V 151,936). So
blocks go through in chunks, and a chunk makes its gradient as soon as it has its loss:

    hidden [B, N, M, D]   ┌ chunk ┐┌ chunk ┐┌ chunk ┐     per chunk: U = h W^T, U + E, both losses,
                          └───────┘└───────┘└───────┘     d loss / d h, d r, d W2; then its logits
                                                          are gone

Its definition is `objective/loss.py`, which a researcher edits; what both read is `token_loss.py`.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from domino_jax.kernels.softmax import SoftmaxSums, softmax_sums
from domino_jax.kernels.token_loss import (
    CROSS_ENTROPY,
    Labels,
    Objective,
    States,
    Tables,
    TokenLoss,
    VocabularyLoss,
    at_place,
    head_logits,
    weighted_sum,
)
from domino_jax.sharding import constrain, split_over_batch


def vocabulary_loss(
    states: States,
    tables: Tables,
    labels: Labels,
    *,
    lambda_base: jax.Array | float = 0.0,
    objective: Objective = CROSS_ENTROPY,
    chunk_blocks: int = 0,
) -> VocabularyLoss:
    """`objective.loss.dual_loss` in chunks, with the gradient derived by hand.

    A prediction's loss is a function of its `nll` and its `divergence` alone, so with `a` and `b`
    the derivatives of the weighted sum by them (which `jax.vjp` gives, of arrays without a
    vocabulary), the gradient of its logits is

        d sum / d logits = a (softmax - onehot(label)) + b (softmax - target's softmax)

    The part of the label is one vector of a table per prediction, the rest a product over the
    vocabulary. Of the final logits `U + E` the same gradient reaches `E = r W2^T` and, through `U`,
    the backbone; of the base logits only `U`. Both are scaled by their shares of the total, and
    added up before the product with the head.

    Args:
        tables: the head is frozen.
        lambda_base: weight of the base loss, may be traced.
        objective: without a `cost` of its own.
        chunk_blocks: blocks whose logits exist at the same time, 0 for all. The chunks after the
            last supervised prediction are left out: unused slots come last.
    Returns:
        `VocabularyLoss`. Logits, log-sum-exp and sums are float32; gradients reach the states and
        `expansion` through `total`. What is said of predictions outside the mask means nothing.
    Raises:
        ValueError: an objective with a `cost`.
    """
    if objective.cost is not None:
        raise ValueError("an objective with a cost of its own runs on objective.loss.dual_loss")
    # Where the target's states are given, each chunk makes the target's logits too.
    if objective.kl_weight == 0:
        labels = labels._replace(target_states=None)
    lambda_base = jnp.asarray(lambda_base, jnp.float32)
    # Laid out here, once: split as a parameter is, the head would be gathered for every chunk.
    head = jax.lax.stop_gradient(tables.lm_head).astype(states.hidden.dtype)
    tables = tables._replace(lm_head=constrain(head, "vocab", None))
    return _vocabulary_loss(_Options(objective, chunk_blocks), states, tables, labels, lambda_base)


@dataclass(frozen=True)
class _Options:
    """Static settings of the loss, hashable as `custom_vjp` requires.

    Attributes:
        objective: as in `vocabulary_loss`.
        chunk_blocks: as in `vocabulary_loss`.
        with_gradient: whether a chunk makes its gradients too.
        transposed: whether the gradient of `expansion` is summed as [R, V], for a CPU.
    """

    objective: Objective
    chunk_blocks: int
    with_gradient: bool = False
    transposed: bool = False


class _Slopes(NamedTuple):
    """Derivatives of a weighted sum by each prediction's `nll` and `divergence`, or None without.

    Both float32 [B, n, M].
    """

    nll: jax.Array
    divergence: jax.Array | None


class _Gradients(NamedTuple):
    """Of `states` and of `expansion`, [V, R] or None.

    Of a chunk, `expansion` (transposed, [R, V]) lacks the labels' part: a vector of `low_rank` per
    prediction, times `labelled` [B, n, M].
    """

    states: States | None = None
    expansion: jax.Array | None = None
    labelled: jax.Array | None = None


@dataclass(frozen=True)
class _Softmax:
    """Logits [..., V] and what makes a softmax of them."""

    logits: jax.Array
    sums: SoftmaxSums

    @classmethod
    def of(cls, logits: jax.Array) -> "_Softmax":
        return cls(logits, softmax_sums(logits))

    @property
    def exps(self) -> jax.Array:
        """The softmax [..., V], not yet divided by its sum."""
        return jnp.exp(self.logits - self.sums.maximum[..., None])

    @property
    def log_sum(self) -> jax.Array:
        return self.sums.maximum + jnp.log(self.sums.total)

    def loss(self, ids: jax.Array, target: "_Softmax | None") -> TokenLoss:
        divergence = None
        if target is not None:
            gaps = target.exps * (target.logits - self.logits)
            mean_gap = jnp.sum(gaps, axis=-1) / target.sums.total
            divergence = mean_gap - target.log_sum + self.log_sum
        return TokenLoss(self.log_sum - at_place(self.logits, ids), self.sums.argmax, divergence)

    def dlogits(self, by: _Slopes, target: "_Softmax | None") -> tuple[jax.Array, jax.Array]:
        """The gradient without the labels' part: [..., V], and a factor of each prediction.

        The factor is not multiplied in yet.
        """
        # Two softmaxes have no one factor, so theirs are multiplied in.
        if target is None or by.divergence is None:
            return self.exps, by.nll / self.sums.total
        own = (by.nll + by.divergence) / self.sums.total
        targets = by.divergence / target.sums.total
        dense = own[..., None] * self.exps - targets[..., None] * target.exps
        return dense, jnp.ones_like(own)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vocabulary_loss(options: _Options, *operands: Any) -> VocabularyLoss:
    loss, _ = _of_devices(options, *operands)
    return loss


def _forward(options: _Options, *operands: Any) -> tuple[VocabularyLoss, _Gradients]:
    return _of_devices(replace(options, with_gradient=True), *operands)


def _of_devices(
    options: _Options, states: States, tables: Tables, labels: Labels, lambda_base: jax.Array
) -> tuple[VocabularyLoss, _Gradients]:
    """The loss and its gradients: chunks of a device's own rows, then one sum over the devices."""

    def of_device(
        states: States, labels: Labels, tables: Tables, lambda_base: jax.Array
    ) -> tuple[Any, Any]:
        # A kernel of a TPU's or a GPU's own becomes a branch here.
        loss, gradients = jax.lax.platform_dependent(
            states,
            tables,
            labels,
            lambda_base,
            cpu=functools.partial(_in_chunks, replace(options, transposed=True)),
            default=functools.partial(_in_chunks, options),
        )
        of_rows = loss.final, loss.base, gradients.states
        sums = loss.total, loss.final_sum, loss.base_sum, gradients.expansion
        return of_rows, sums

    run = split_over_batch(of_device, by_row=(True, True, False, False))
    (final, base, of_states), (total, final_sum, base_sum, expansion) = run(
        states, labels, tables, lambda_base
    )
    loss = VocabularyLoss(total, final_sum, base_sum, final, base)
    return loss, _Gradients(of_states, expansion)


def _backward(
    _: Any, gradients: _Gradients, cotangent: VocabularyLoss
) -> tuple[States, Tables, None, None]:
    # The gradients of `total` are there since the forward pass; it is all that carries one.
    states, expansion, _ = jax.tree.map(lambda g: g * cotangent.total.astype(g.dtype), gradients)
    return states, Tables(None, expansion), None, None  # type: ignore[arg-type]


_vocabulary_loss.defvjp(_forward, _backward)


def _in_chunks(
    options: _Options, states: States, tables: Tables, labels: Labels, lambda_base: jax.Array
) -> tuple[VocabularyLoss, _Gradients]:
    """The loss and the gradients of states and expansion, one chunk of blocks after the other."""
    # Once, not in every chunk.
    tables = jax.tree.map(lambda table: table.astype(states.hidden.dtype), tables)
    chunk = functools.partial(_chunk, options, tables=tables, lambda_base=lambda_base)
    blocks = states.hidden.shape[1]
    chunk_blocks = options.chunk_blocks
    if chunk_blocks == 0 or chunk_blocks >= blocks:
        loss, gradients = chunk(states, labels)
        return loss, _with_labels(gradients, states, labels, transposed=options.transposed)
    chunks = -(-blocks // chunk_blocks)

    def split(x: jax.Array) -> jax.Array:  # [B, N, ...] -> [chunks, B, chunk, ...]
        x = jnp.pad(x, ((0, 0), (0, chunks * chunk_blocks - blocks)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(x.shape[0], chunks, chunk_blocks, *x.shape[2:]).swapaxes(0, 1)

    def joined(x: jax.Array) -> jax.Array:  # and back
        return x.swapaxes(0, 1).reshape(x.shape[1], chunks * chunk_blocks, *x.shape[3:])[:, :blocks]

    def one(parts: tuple[States, Labels]) -> tuple[Any, Any]:
        loss, gradients = chunk(*parts)
        sums = jnp.stack([loss.final_sum, loss.base_sum]), gradients.expansion
        return sums, (loss.final, loss.base, gradients._replace(expansion=None))

    def add(index: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        sums, outs = carry
        new, out = one(jax.tree.map(lambda x: x[index], parts))
        outs = jax.tree.map(lambda whole, x: whole.at[index].set(x), outs, out)
        return jax.tree.map(jnp.add, sums, new), outs

    parts = jax.tree.map(split, (states, labels))
    of_sums, of_outs = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), of_sums)
    outs = jax.tree.map(lambda x: jnp.zeros((chunks, *x.shape), x.dtype), of_outs)
    # A loop with a traced end: a scan would need a conditional to skip the last chunks, whose
    # products XLA on CPU ran on one core (2.0 s a step against 1.14 s).
    supervised = jnp.any(parts[1].mask > 0, axis=(1, 2, 3))
    needed = jnp.max(jnp.where(supervised, jnp.arange(1, chunks + 1), 0))
    ((final_sum, base_sum), expanded), outs = jax.lax.fori_loop(0, needed, add, (sums, outs))
    final, base, gradients = jax.tree.map(joined, outs)
    total = _total(final_sum, base_sum, lambda_base)
    loss = VocabularyLoss(total, final_sum, base_sum, final, base)
    gradients = gradients._replace(expansion=expanded)
    return loss, _with_labels(gradients, states, labels, transposed=options.transposed)


def _with_labels(
    gradients: _Gradients, states: States, labels: Labels, *, transposed: bool
) -> _Gradients:
    """The gradients of states and expansion, with the labels' part added once for all chunks."""
    expansion = gradients.expansion
    if expansion is not None and states.low_rank is not None and gradients.labelled is not None:
        if transposed:
            # Without the barrier XLA would transpose the product again.
            with jax.named_scope("cpu_expansion"):
                expansion = jax.lax.optimization_barrier(expansion).T
        expansion = expansion.at[labels.target_ids].add(
            -gradients.labelled[..., None] * states.low_rank
        )
    return _Gradients(gradients.states, expansion)


def _chunk(
    options: _Options, states: States, labels: Labels, *, tables: Tables, lambda_base: jax.Array
) -> tuple[VocabularyLoss, _Gradients]:
    """Loss and gradients of blocks whose logits fit in memory."""
    objective = options.objective
    ids = labels.target_ids
    product = head_logits(states.hidden, tables.lm_head)
    base_logits, output_vjp = jax.vjp(objective.output_logits, product)
    target = None
    if labels.target_states is not None:
        target_product = head_logits(labels.target_states, tables.lm_head)
        target = _Softmax.of(objective.output_logits(target_product))
    base = final = _Softmax.of(base_logits)
    if states.low_rank is not None and tables.expansion is not None:
        final = _Softmax.of(base_logits + head_logits(states.low_rank, tables.expansion))
    base_loss = base.loss(ids, target)
    final_loss = final.loss(ids, target)
    base_sum, base_slopes = _sum_and_slopes(base_loss, labels, objective)
    final_sum, final_slopes = _sum_and_slopes(final_loss, labels, objective)
    loss = VocabularyLoss(
        _total(final_sum, base_sum, lambda_base), final_sum, base_sum, final_loss, base_loss
    )
    if not options.with_gradient:
        return loss, _Gradients()

    base_slopes = jax.tree.map(lambda x: lambda_base * x, base_slopes)
    final_slopes = jax.tree.map(lambda x: (1.0 - lambda_base) * x, final_slopes)
    dense, scale = final.dlogits(final_slopes, target)
    dense_base, scale_base = base.dlogits(base_slopes, target)
    # The corrected logits' part is scaled outside its products; both parts are added up for the one
    # with the head.
    (dlogits,) = output_vjp(scale[..., None] * dense + scale_base[..., None] * dense_base)
    # What the head does to its product is elementwise: the labels' own logits are enough here.
    labelled = base_slopes.nll + final_slopes.nll
    _, label_vjp = jax.vjp(objective.output_logits, at_place(product, ids))
    (labelled,) = label_vjp(labelled)
    dlogits = dlogits.astype(states.hidden.dtype)
    ones = jnp.ones_like(scale)
    hidden_gradient = _states_gradient(dlogits, ones, tables.lm_head, labelled, ids)
    if states.low_rank is None or tables.expansion is None:
        return loss, _Gradients(States(hidden_gradient))
    dense = dense.astype(states.low_rank.dtype)
    low_rank_gradient = _states_gradient(dense, scale, tables.expansion, final_slopes.nll, ids)
    scaled = (scale[..., None] * states.low_rank).astype(states.low_rank.dtype)
    # On a CPU [R, V]: the other way round the large factor would be transposed first.
    equation = "bnmr,bnmv->rv" if options.transposed else "bnmv,bnmr->vr"
    factors = (scaled, dense) if options.transposed else (dense, scaled)
    expansion_gradient = jnp.einsum(equation, *factors, preferred_element_type=jnp.float32)
    of_states = States(hidden_gradient, low_rank_gradient)
    return loss, _Gradients(of_states, expansion_gradient, final_slopes.nll)


def _total(final_sum: jax.Array, base_sum: jax.Array, lambda_base: jax.Array) -> jax.Array:
    return (1.0 - lambda_base) * final_sum + lambda_base * base_sum


def _sum_and_slopes(
    token: TokenLoss, labels: Labels, objective: Objective
) -> tuple[jax.Array, _Slopes]:
    """The weighted sum of a chunk, and its derivatives by `nll` and `divergence`."""

    def total(nll: jax.Array, divergence: jax.Array | None) -> jax.Array:
        return weighted_sum(TokenLoss(nll, token.prediction, divergence), labels, objective)

    value, vjp = jax.vjp(total, token.nll, token.divergence)
    return value, _Slopes(*vjp(jnp.ones_like(value)))


def _states_gradient(
    dense: jax.Array, scale: jax.Array, table: jax.Array, labelled: jax.Array, ids: jax.Array
) -> jax.Array:
    products = jnp.einsum("...v,vd->...d", dense, table, preferred_element_type=jnp.float32)
    return (scale[..., None] * products - labelled[..., None] * table[ids]).astype(dense.dtype)
