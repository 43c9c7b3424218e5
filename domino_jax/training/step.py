"""One optimisation step as one program: target forward, anchors, draft forward, losses, update.

In one program the target's states stay on the devices and die as soon as they are read, and the
host has nothing to wait for: not even for the verdict whether the update is taken.

    for each of A micro-batches [B, S]
        target -> features [B, S, C*D] -> anchors, blocks [B, N, K] -> draft -> loss -> gradient
        gradient x loss weight, metric sums    added up
    over the sum of weights -> norm -> new state, or the old one number by number
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from domino_jax.base.scopes import TARGET, UPDATE
from domino_jax.draft.blocks import document_ids
from domino_jax.objective.metrics import DFlashStepMetrics
from domino_jax.objective.modules import DFlashTrainerModule
from domino_jax.sharding import constrain
from domino_jax.target.decoder import Target, lm_head_weight
from domino_jax.training.metrics import metric_sums


class TrainState(flax.struct.PyTreeNode):
    """What training changes: the draft, the optimiser's state and, if kept, the average draft.

    `step` counts batches. A batch whose update is skipped counts too: keys, data, lambda and
    checkpoints follow it. The optimiser counts its own updates in `opt_state`, which lag behind by
    the skipped ones.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema: Any = None


class Batch(NamedTuple):
    """Token rows of one step, A micro-batches of B rows.

    `input_ids` int32 [A, B, S] and `loss_mask` bool [A, B, S] are always there. Packed rows have
    `position_ids` int32 [A, B, S], `seq_lens` int32 [A, B, documents] and `doc_remaining` int32
    [A, B, S] (see `draft.blocks.Packing`). Rows of captured states have `features` [A, B, S, C*D],
    which the target is not run for then, and, if they were captured too, `target_states`
    [A, B, S, D], the target's states after its final norm.
    """

    input_ids: jax.Array
    loss_mask: jax.Array
    position_ids: jax.Array | None = None
    seq_lens: jax.Array | None = None
    doc_remaining: jax.Array | None = None
    features: jax.Array | None = None
    target_states: jax.Array | None = None


@dataclass(frozen=True)
class Program:
    """What a step is compiled for.

    Attributes:
        trainer: the draft with its loss.
        target: the frozen target, `scan_layers`, capturing the draft's layers; whole where the loss
            reads the target's logits, else as deep as they need.
        optimizer: an optax transformation.
        curriculum: lambda_base as a function of `TrainState.step`.
        seed: of the anchors.
        ema_decay: of the average draft, None to keep none.
    """

    trainer: DFlashTrainerModule
    target: Target
    optimizer: optax.GradientTransformation
    curriculum: optax.Schedule
    seed: int = 0
    ema_decay: float | None = None


def initial_state(program: Program, params: Any) -> TrainState:
    """A state at step 0 from the draft's parameters."""
    # A copy: a step that consumes its state cannot be given one buffer twice.
    ema = None if program.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, program.optimizer.init(params), ema)


def train_step(
    program: Program, state: TrainState, target_params: Any, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the draft.

    Micro-batches are weighted by their loss weight, so that A of them give the gradient of one
    large batch.

    The update is skipped, one decision for all micro-batches, where nothing in them is supervised
    (no anchors: AdamW fed with zeros would still move), or where the loss or the gradient's norm is
    not finite. Draft, optimiser state (its counts too) and average then stay as they were, bit for
    bit; only `step` advances.

    Args:
        program: static parts; jit with it bound by `functools.partial` or closed over.
        state: consumed when its buffers are donated.
        target_params: frozen, layers stacked.
        batch: `Batch`.
    Returns:
        The next state and the additive sums of `metric_sums`, plus float32 `grad_norm` before
        clipping, `updates` and `skipped_nonfinite`, one of which is 1 unless there was no anchor. A
        step that is not finite adds 0 to all but the counts, so that it does not spoil a window.
    """
    lambda_base = program.curriculum(state.step)
    # From seed and step alone: a resumed run draws the same anchors, and no key has to be saved.
    key = jax.random.fold_in(jax.random.key(program.seed), state.step)

    def micro_step(index: jax.Array | int, micro: Batch) -> tuple[Any, dict[str, jax.Array]]:
        def loss(params: Any) -> tuple[jax.Array, DFlashStepMetrics]:
            metrics = batch_metrics(
                program,
                params,
                target_params,
                micro,
                key=jax.random.fold_in(key, index),
                lambda_base=lambda_base,
            )
            return metrics.loss, metrics

        grads, metrics = jax.grad(loss, has_aux=True)(state.params)
        return grads, metric_sums(metrics)

    grads, sums, weight = _over_micro_batches(micro_step, batch)

    def mean(grads: Any) -> Any:
        return jax.tree.map(lambda g: g * weight / (sums["loss_weight"] + 1e-6), grads)

    def update() -> TrainState:
        updates, opt_state = program.optimizer.update(mean(grads), state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if program.ema_decay is not None:
            ema = optax.incremental_update(params, state.ema, 1.0 - program.ema_decay)
        return TrainState(state.step, params, opt_state, ema)

    with jax.named_scope(UPDATE):
        # A norm is finite only where every part of the gradient is.
        grad_norm = optax.tree.norm(mean(grads))
        finite = jnp.isfinite(sums["loss_sum"]) & jnp.isfinite(grad_norm)
        # Without blocks the gradient is 0, of which AdamW's moments and decay make an update all
        # the same.
        updated = finite & (sums["valid_blocks"] > 0)
        # A choice of each number, not a branch around all: a GPU's compiler may copy the state into
        # a branch and out of it.
        after = jax.tree.map(functools.partial(jnp.where, updated), update(), state)
        after = after.replace(step=state.step + 1)
    # Counts stand even for a step that is not finite: it was a batch, and it was skipped.
    counts = {name: sums[name] for name in ("batches", "batches_without_anchor")}
    counts |= {"updates": updated.astype(jnp.float32)}
    counts |= {"skipped_nonfinite": (~finite).astype(jnp.float32)}
    measured = {
        name: jnp.where(finite, x, 0.0) for name, x in (sums | {"grad_norm": grad_norm}).items()
    }
    return after, measured | counts


class _Total(NamedTuple):
    """What all micro-batches of a step give.

    `grads` times `weight`, float32 [], is the sum over them of gradient times loss weight; `sums`
    are their `metric_sums`.
    """

    grads: Any
    sums: dict[str, jax.Array]
    weight: jax.Array


def _over_micro_batches(
    micro_step: Callable[[jax.Array | int, Batch], tuple[Any, dict[str, jax.Array]]], batch: Batch
) -> _Total:
    """Takes a function that gives gradient and `metric_sums` of one over all micro-batches."""
    count = batch.input_ids.shape[0]
    if count == 1:  # no loop around the one
        grads, sums = micro_step(0, jax.tree.map(lambda x: x[0], batch))
        return _Total(grads, sums, sums["loss_weight"] + 1e-6)
    # Traced for its shapes alone; nothing is computed twice.
    first = jax.eval_shape(lambda: micro_step(0, jax.tree.map(lambda x: x[0], batch)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)

    def add(total: Any, indexed: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        grads, sums = micro_step(*indexed)
        # The loss is divided by its own weight; times it, shares of one large batch add up.
        grads = jax.tree.map(lambda g: g * (sums["loss_weight"] + 1e-6), grads)
        return jax.tree.map(jnp.add, total, (grads, sums)), None

    (grads, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(count), batch))
    return _Total(grads, sums, jnp.float32(1))  # weighed one by one


def all_finite(tree: Any) -> jax.Array:
    """Whether every element of a tree of arrays is finite, bool []."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def batch_metrics(
    program: Program,
    params: Any,
    target_params: Any,
    batch: Batch,
    *,
    key: jax.Array,
    lambda_base: jax.Array | float,
) -> DFlashStepMetrics:
    """Forward of one micro-batch [B, S]: loss and metrics of the draft.

    The target's states come first, unless they were captured.
    """
    input_ids = constrain(batch.input_ids, "batch", "length")
    if batch.features is None:
        documents = None
        if batch.seq_lens is not None:
            documents = document_ids(batch.seq_lens, input_ids.shape[1])
        with jax.named_scope(TARGET):
            out = program.target.apply(
                {"params": target_params}, input_ids, batch.position_ids, documents=documents
            )
        features = out.features
        target_states = out.hidden
    else:
        # Captures may be stored in another type than the one that the run computes in.
        features = constrain(batch.features, "batch", "length", None)
        features = features.astype(program.target.cfg.dtype)
        target_states = batch.target_states
    return program.trainer.apply(
        {"params": {"draft_model": params}},
        input_ids,
        features,
        batch.loss_mask,
        lm_head_weight(target_params),
        target_params["embed_tokens"],
        position_ids=batch.position_ids,
        seq_lens=batch.seq_lens,
        doc_remaining=batch.doc_remaining,
        target_states=target_states,
        lambda_base=lambda_base,
        rngs={"anchors": key},
    )
