"""AdamW with warm-up, cosine decay and a bound on the gradient's norm."""

import optax

from domino_jax.config import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then a cosine to `final_ratio` of the peak, as a function of the optimiser step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=round(total_steps * config.warmup_ratio),
        decay_steps=total_steps,
        end_value=config.learning_rate * config.final_ratio,
    )


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The update of one step: clip by global norm, then AdamW on the schedule; state and masters are float32."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, total_steps), b1=config.b1, b2=config.b2, weight_decay=config.weight_decay
        ),
    )
