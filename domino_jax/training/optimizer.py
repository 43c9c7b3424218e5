"""What a gradient does to the draft, made from the configuration alone.

A run, its resumed start and a plan for other machines must take the same update, so it is built in
one place: AdamW with warm-up, cosine decay and a bound on the gradient's norm.

    updates    0    ..       end of warm-up   ..       total_steps             ..
    rate       0    linear   peak             cosine   final_ratio x peak      the same
"""

from typing import Any

import jax
import optax

from domino_jax.config.sections import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The learning rate by updates: linear from 0, then a cosine to `final_ratio` of the peak.

    A step whose update is skipped does not count, as in the reference, whose scheduler steps with
    its optimiser: after skipped steps the schedule lags behind `TrainState.step`.
    """
    # One update at least is left to the cosine, which optax could not build otherwise.
    warmup = min(round(total_steps * config.warmup_ratio), total_steps - 1)
    # By updates and not by steps: Adam counts the same, and both are saved with its state.
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=total_steps,  # optax counts the warm-up among them
        end_value=config.learning_rate * config.final_ratio,
    )


def updates_done(opt_state: Any) -> jax.Array:
    """int32 [], the updates that a state of `make_optimizer` has seen: its schedule's argument."""
    # Adam's moments and the schedule count apart. Both count every update, so the first serves.
    _, count = optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0]
    return count


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The update of one step: clip by global norm, then AdamW on the schedule.

    State and master weights are float32.
    """
    # Clipped before the moments see it: an outlier would stay in them for many steps.
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        ),
    )
