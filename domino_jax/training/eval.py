"""Held-out passes: how well a draft predicts rows that it is not trained on, teacher-forced.

The same rows and the same anchors every time, so that two passes differ by the draft alone:

    held-out rows -> batches -> sums on the devices -> added up over batches -> means
"""

from collections.abc import Callable
from typing import Any

import jax

from domino_jax.data.pipeline import heldout_batches
from domino_jax.training.inputs import device_batch
from domino_jax.training.metrics import metric_means, metric_sums
from domino_jax.training.run import Run
from domino_jax.training.step import Batch, TrainState, batch_metrics

HELDOUT_SEED = 1  # folded into the run's seed: held-out anchors are the same at every evaluation


class HeldOut:
    """Measures the held-out rows of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run

        @jax.jit
        def sums(
            params: Any, target_params: Any, batch: Batch, key: jax.Array
        ) -> dict[str, jax.Array]:
            # Without the base loss, whatever the curriculum: only corrected logits are decoded.
            metrics = batch_metrics(
                run.inputs.program, params, target_params, batch, key=key, lambda_base=0.0
            )
            return metric_sums(metrics)

        self._sums = sums

    def __call__(
        self, state: TrainState, *, stop_requested: Callable[[], bool]
    ) -> dict[str, float] | None:
        """The figures, or None where the run was asked to stop between two batches."""
        inputs, heldout = self._run.inputs, self._run.inputs.heldout
        assert heldout is not None
        # The average where there is one: it is what is exported.
        params = state.params if state.ema is None else state.ema
        key = jax.random.fold_in(jax.random.key(inputs.program.seed), HELDOUT_SEED)
        batches = heldout_batches(
            heldout.rows,
            # As many batch rows as a micro-batch of a step: what fits there fits here.
            batch_size=inputs.shape.batch_size // jax.process_count(),
            max_length=inputs.shape.max_length,
            packs=heldout.packs,
        )
        total: dict[str, Any] = {}
        for index, arrays in enumerate(batches):
            if stop_requested():
                return None
            micro_batches = device_batch(inputs.mesh, arrays, micro_batches=1)
            batch = jax.tree.map(lambda x: x[0], micro_batches)
            sums = self._sums(
                params, self._run.target_params, batch, jax.random.fold_in(key, index)
            )
            total = {name: total[name] + x for name, x in sums.items()} if total else sums
        return metric_means(jax.device_get(total))
