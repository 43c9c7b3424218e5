"""A trace of some steps of a run, for TensorBoard's profiler: what the devices did, and when.

The host only starts steps. So at both ends the devices are waited for, and that time is not
training's:

    step 9 | wait, start | step 10  step 11  step 12 | wait, stop | step 13      profile: [10, 3]
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax

from domino_jax.base.progress import Reporter


class Trace:
    """Traces the steps that `train.profile` asks for, as a context around all steps of a run.

    The devices are waited for at both ends, so that it holds whole steps. A run that ends between
    them leaves what it had.
    """

    def __init__(
        self,
        run_dir: Path,
        profile: tuple[int, int] | None,
        coming: range,
        *,
        paused: Callable[[Any], AbstractContextManager[None]],
        reporter: Reporter,
    ) -> None:
        """Says so where none of the steps will run.

        Args:
            run_dir: receives `profile/`.
            profile: the first step and how many, or None.
            coming: the steps that this start has to run, perhaps none.
            paused: `Speed.paused`.
            reporter: is told where the trace is.
        """
        self._directory = run_dir / "profile"
        self._paused = paused
        self._reporter = reporter
        self._first, self._last = 0, 0  # steps count from 1
        self._running, self._reached = False, 0
        if profile is None:
            return
        first, last = profile[0], sum(profile) - 1
        # An earlier start may have run some of them, and this one may end before the rest.
        self._first = max(first, coming.start)
        self._last = min(last, coming.stop - 1)
        if self._first > self._last:
            reporter.say(
                f"train.profile: no trace of steps {first} to {last}: this start goes "
                f"from step {coming.start - 1} to {coming.stop - 1}"
            )

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:  # a profiler that is left running refuses the next start
            self._stop()

    def before(self, step: int, state: Any) -> None:
        """Starts the trace if `step` is the first of it; `state` is the one that it begins from."""
        # The second comparison for a range of which nothing is left.
        if step == self._first <= self._last:
            with self._paused(state):
                jax.profiler.start_trace(self._directory)
            self._running, self._reached = True, step

    def after(self, step: int, state: Any) -> None:
        """Ends the trace if `step` is the last of it; `state` is what it left."""
        if not self._running:
            return
        self._reached = step
        if step == self._last:
            with self._paused(state):
                self._stop()

    def _stop(self) -> None:
        self._running = False  # before the call: should it fail, leaving does not repeat it
        jax.profiler.stop_trace()
        self._reporter.say(
            f"steps {self._first} to {self._reached} are traced in {self._directory}; to see them: "
            f"pip install tensorboard xprof; tensorboard --logdir {self._directory}"
        )
