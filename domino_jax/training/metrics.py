"""What a run measured: sums that add up over batches, means made from them last, and their log.

Means of means are biased by short batches, so sums travel and the division comes last. A resumed
run does some steps again, and its log must still be that of a run that never stopped. So the log is
taken back to where it stood when the state was saved:

    metrics.jsonl    lines of steps up to the checkpoint | lines of steps that are done again
                     bytes and sha256 in the checkpoint  | cut off when the run is resumed
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp

from domino_jax.base.errors import InputError
from domino_jax.base.files import open_appending, read_chunks, whole_file
from domino_jax.base.progress import Reporter
from domino_jax.objective.metrics import DFlashStepMetrics
from domino_jax.training.log import METRICS, TIMING, LogMark, read_timing

# Each mean of a window, the sum it is made from and what divides it. Those of the base logits are
# there only where a head makes final ones from them.
MEANS = {
    "loss": ("loss_sum", "loss_weight"),
    "accuracy": ("correct_tokens", "valid_tokens"),
    "accept_len": ("accept_len_sum", "valid_blocks"),
    "final_loss": ("final_loss_sum", "loss_weight"),
    "base_loss": ("base_loss_sum", "loss_weight"),
    "base_accuracy": ("base_correct_tokens", "valid_tokens"),
    "base_accept_len": ("base_accept_len_sum", "valid_blocks"),
}
# The least that divides: a weight may be a fraction of a token.
SMALLEST = {"loss_weight": 1e-6, "valid_tokens": 1.0, "valid_blocks": 1.0}


def metric_sums(metrics: DFlashStepMetrics) -> dict[str, jax.Array]:
    """What adds up over micro-batches, hosts and windows; float32 scalars.

    Losses, which are means, are multiplied by their weight.
    """
    measured = vars(metrics)
    sums = {name: measured[name] for name in SMALLEST}
    for mean, (name, divisor) in MEANS.items():
        if name in measured:
            sums[name] = measured[name]
        # A loss is measured as its mean alone.
        elif mean in measured:
            sums[name] = measured[mean] * measured[divisor]
    sums["batches"] = jnp.float32(1)
    sums["batches_without_anchor"] = (metrics.valid_blocks == 0).astype(jnp.float32)
    return sums


def metric_means(sums: dict[str, Any]) -> dict[str, float]:
    """Means from added-up `metric_sums`: token-weighted losses, block-weighted acceptance lengths.

    With the counts of `train_step` among the sums, also the mean `grad_norm` of the updates.
    Without anchors the means are 0; where all else was skipped as not finite they are NaN, as is
    the norm where there was no update.
    """
    means = {
        mean: sums[name] / max(float(sums[divisor]), SMALLEST[divisor])
        for mean, (name, divisor) in MEANS.items()
        if name in sums
    }
    # All was skipped: 0 would read like a perfect loss.
    if sums.get("skipped_nonfinite") and not sums["valid_blocks"]:
        means = dict.fromkeys(means, math.nan)
    counts = ["valid_tokens", "valid_blocks", "batches_without_anchor"]
    if "updates" in sums:  # a held-out pass has none
        means["grad_norm"] = math.nan
        if sums["updates"]:
            means["grad_norm"] = sums["grad_norm"] / sums["updates"]
        counts += ["updates", "skipped_nonfinite"]
    means |= {name: sums[name] for name in counts}
    return {name: float(value) for name, value in means.items()}


class MetricsLog:
    """`metrics.jsonl` and `timing.jsonl` of a run directory and, when asked for, TensorBoard files.

    One record per line: `step`, `split` ("data", "train", "heldout", "rollout", "skipped" or
    "spike") and its figures. `metrics.jsonl` holds what the seed determines: two runs of one
    configuration write the same bytes, however often they are stopped and resumed. Times and speeds
    are in `timing.jsonl`. A figure that is not finite is null, and `not_finite` names it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        at: LogMark | None,
        step: int,
        tensorboard: bool,
        reporter: Reporter,
    ) -> None:
        """Opens the files as they were when the state was saved that the run starts with.

        Args:
            directory: the run's.
            at: end of `metrics.jsonl` then; what follows is cut off, to be written again. None
                begins a log.
            step: of that state; later records of `timing.jsonl` are dropped.
            tensorboard: write TensorBoard files too.
            reporter: is told when a log is gone.
        Raises:
            InputError: `metrics.jsonl` is not what it was.
        """
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(directory / "tensorboard"))
        self._hash, self._count = hashlib.sha256(), 0
        if at is not None:
            self._take(directory / METRICS, at, reporter=reporter)
        # Nothing depends on times, so they carry no mark: a step number is enough to drop them.
        with whole_file(directory / TIMING) as timing:
            for record in read_timing(directory) if at is not None else ():
                if record.get("step", 0) <= step:
                    timing.write(_json_line(record).encode())
        self._files = {name: open_appending(directory / name) for name in (METRICS, TIMING)}
        self._files[METRICS].truncate(self._count)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            # Told already: each line is flushed as it is written.
            with contextlib.suppress(OSError):
                file.close()
        if self._board:
            self._board.close()

    def write(
        self,
        step: int,
        split: str,
        figures: Mapping[str, Any],
        *,
        timing: dict[str, float] | None = None,
    ) -> None:
        """Adds one record of `figures`, and one of `timing` if given, and flushes both."""
        for name, part in ((METRICS, figures), (TIMING, timing)):
            if part is None:
                continue
            line = _json_line({"step": step, "split": split, **part}).encode()
            with _named(self._files[name]) as file:
                file.write(line)
                file.flush()  # outlives a kill of the process; of the machine, from `mark` on
            if name == METRICS:
                # Along the way: a save need not read a log that may be long.
                self._hash.update(line)
                self._count += len(line)
            for figure, value in part.items():
                if self._board and isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(f"{split}/{figure}", value, step)

    def _take(self, path: Path, at: LogMark, *, reporter: Reporter) -> None:
        """Takes the first bytes of an earlier start's log as those of this one."""
        # Empty after a start that found no log and ended before its first record.
        empty = path.is_file() and path.stat().st_size == 0
        if at.bytes and (empty or not path.exists()):
            reporter.say(
                f"{path} is gone or empty: the log begins anew, without the records up to here"
            )
            return
        for chunk in read_chunks(path, at.bytes) if path.exists() else ():
            self._hash.update(chunk)
            self._count += len(chunk)
        if LogMark(self._count, self._hash.hexdigest()) != at:
            raise InputError(
                f"{path}: its first {at.bytes} bytes are not those that the checkpoint was saved "
                "with; put them back, or remove the file to resume with a log that begins anew"
            )

    def mark(self) -> LogMark:
        """Where `metrics.jsonl` stands; on disk when this returns."""
        with _named(self._files[METRICS]) as file:
            os.fsync(file.fileno())
        return LogMark(self._count, self._hash.hexdigest())


@contextlib.contextmanager
def _named(file: BinaryIO) -> Iterator[BinaryIO]:
    """Gives an error of the system the name of its file, which it lacks for one that is open."""
    try:
        yield file
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def _json_line(record: dict[str, Any]) -> str:
    odd = [name for name, x in record.items() if isinstance(x, float) and not math.isfinite(x)]
    if odd:  # JSON knows neither NaN nor infinity, and strict readers stop at them
        record = record | dict.fromkeys(odd) | {"not_finite": odd}
    return json.dumps(record, allow_nan=False) + "\n"
