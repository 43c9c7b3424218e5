"""How well a draft predicts rows that it is not trained on, measured inside the training process.

Teacher-forced: each position sees the row's own tokens before it, whatever the draft would have
said. The same rows and the same anchors every time, so that two passes differ by the draft alone:

    held-out rows -> batches -> sums on the devices -> added up over batches -> means
"""

from collections.abc import Callable
from typing import Any

import jax

from domino_jax.training.inputs import device_batch, evaluation_batches
from domino_jax.training.metrics import metric_means, metric_sums
from domino_jax.training.run import Run
from domino_jax.training.step import Batch, TrainState, batch_metrics

HELDOUT_SEED = 1  # folded into the run's seed: held-out anchors are the same at every evaluation


class HeldOut:
    """Measures the held-out rows of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run

        def sums(
            params: Any, target_params: Any, batch: Batch, key: jax.Array
        ) -> dict[str, jax.Array]:
            # Without the base loss, whatever the curriculum: only corrected logits are decoded.
            return metric_sums(
                batch_metrics(run.program, params, target_params, batch, key=key, lambda_base=0.0)
            )

        self._sums = jax.jit(sums)

    def __call__(
        self, state: TrainState, *, stop_requested: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The figures, or None where the run was asked to stop between two batches."""
        run = self._run
        assert run.heldout is not None
        # The average where there is one: it is what is exported.
        params = state.params if state.ema is None else state.ema
        key = jax.random.fold_in(jax.random.key(run.program.seed), HELDOUT_SEED)
        # As many batch rows as a micro-batch of a step: what fits there fits here.
        batches = evaluation_batches(
            run.heldout, batch_size=run.shape.batch_size, max_length=run.shape.max_length
        )
        total: dict[str, Any] = {}
        for index, arrays in enumerate(batches):
            if stop_requested():
                return None
            # The one micro-batch that there is.
            taken = device_batch(run.mesh, arrays, micro_batches=1)
            batch = jax.tree.map(lambda x: x[0], taken)
            batch_key = jax.random.fold_in(key, index)
            sums = self._sums(params, run.target_params, batch, batch_key)
            if total:
                sums = {name: total[name] + value for name, value in sums.items()}
            total = sums
        return metric_means(jax.device_get(total))
