"""AdamW with a clipped gradient, linear warm-up and cosine decay: one update of the draft.

A run, its resumed start and a plan for other machines must take the same update, so the optimizer
is built here alone, from the configuration. W warm-up updates of T updates in all:

    update k    0 .. W - 1              W .. T                             after T
    rate        peak x (k + 1) / W      cosine, peak to min_lr_ratio x peak  min_lr_ratio x peak
"""

from typing import Any

import jax
import optax


def learning_rate_schedule(
    *, learning_rate: float, warmup_ratio: float, min_lr_ratio: float, total_steps: int
) -> optax.Schedule:
    """Learning rate by update: linear warm-up, then a cosine to `min_lr_ratio` of the peak.

    The warm-up takes W = `max(1, int(total_steps * warmup_ratio))` updates. Its first update
    already has the rate `peak / W`: no update has the rate 0.

    Args:
        learning_rate: the peak.
        warmup_ratio: share of the updates with a rising rate.
        min_lr_ratio: last rate over the peak.
        total_steps: T, updates of the run.
    Returns:
        A function of the number of updates done before this one, int or traced int32 []. Skipped
        steps are not updates: the schedule then lags behind `TrainState.step`, as in the reference,
        whose scheduler steps with its optimizer.
    Source: NeMo AutoModel 0.7.0, `make_warmup_cosine_schedule` of `_spec_train_utils.py` and the
        number of warm-up updates in `train_dflash.py`.
    """
    peak = learning_rate
    warmup = max(1, int(total_steps * warmup_ratio))
    # The cosine begins at the peak, one update after the warm-up reached it. optax refuses a decay
    # over no update, which a warm-up over the whole run would leave.
    linear = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    cosine = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup), alpha=min_lr_ratio)
    return optax.join_schedules([linear, cosine], [warmup])


def updates_done(opt_state: Any) -> jax.Array:
    """int32 [], the updates that a state of `make_optimizer` has seen: its schedule's argument."""
    # Adam's moments and the schedule count apart. Both count every update, so the first serves.
    _, count = optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0]
    return count


def make_optimizer(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """The update of one step: clip by global norm, then AdamW on the schedule.

    State and master weights are float32.
    """
    # Clipped before the moments see it: an outlier would stay in them for many steps.
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay),
    )
