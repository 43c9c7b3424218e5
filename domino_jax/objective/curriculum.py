"""The base-anchor curriculum: how much of the loss is the backbone's alone (see `loss.py`).

step      0               ..           decay_steps   ..   total_steps
weight    lambda_start    linear to    0             ..   0
"""

import jax.numpy as jnp
import optax


def get_lambda_base(
    global_step: int, total_steps: int, lambda_start: float = 1.0, decay_ratio: float = 0.5
) -> float:
    """Weight of the base loss at a step.

    Args:
        global_step: steps done; here these are batches, those whose update was skipped included.
        total_steps: steps of the run.
        lambda_start: weight at step 0.
        decay_ratio: share of the run over which the weight falls linearly to 0.
    Returns:
        A float in 0..1.
    Source: NeMo AutoModel 0.7.0, `get_lambda_base`; Domino (arXiv:2605.29707).

    >>> [get_lambda_base(step, 100) for step in (0, 25, 50, 99)]
    [1.0, 0.5, 0.0, 0.0]
    """
    # At least 1, or a ratio of 0 would divide by zero. The weight is then 0 from step 1 on.
    decay_steps = max(1, int(total_steps * decay_ratio))
    done = min(global_step / decay_steps, 1.0)
    return max(0.0, min(1.0, lambda_start * (1.0 - done)))


def lambda_base_schedule(
    total_steps: int, *, lambda_start: float = 1.0, decay_ratio: float = 0.5
) -> optax.Schedule:
    """`get_lambda_base` as an optax schedule of `TrainState.step`, which may be traced.

    Returns float32 [] in 0..1.
    """
    # Of the traced counter: as a number of Python's the weight would be a constant of the program,
    # and every step would compile another one.
    decay_steps = max(1, int(total_steps * decay_ratio))
    linear = optax.linear_schedule(lambda_start, 0.0, decay_steps)
    return lambda step: jnp.clip(jnp.asarray(linear(step), jnp.float32), 0.0, 1.0)
