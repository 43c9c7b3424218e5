"""AdamW with warm-up, cosine decay and a bound on the gradient's norm."""

from typing import Any

import jax
import optax

from domino_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_ratio` of the peak, over the optimiser's updates.

    A step whose update is skipped does not count, as in the reference, whose scheduler steps with
    its optimiser: after skipped steps the schedule lags behind `TrainState.step`.
    """
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=round(total_steps * config.warmup_ratio),
        decay_steps=total_steps,
        end_value=config.learning_rate * config.final_ratio,
    )


def updates_done(opt_state: Any) -> jax.Array:
    """int32 [], the updates that a state of `make_optimizer` has seen: its schedule's argument."""
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count")[0][1]


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The update of one step: clip by global norm, then AdamW on the schedule; state and masters are float32."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
        ),
    )
