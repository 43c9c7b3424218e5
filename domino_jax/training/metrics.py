"""What a run measured: sums that add up over batches, means made from them last, and the log they are written to."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.strict import InputError
from domino_jax.training.modules import DFlashStepMetrics, DominoStepMetrics

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


def metric_sums(metrics: DFlashStepMetrics) -> dict[str, jax.Array]:
    """What adds up over micro-batches, hosts and windows; float32 scalars. Losses are multiplied by their weight."""
    weight = metrics.loss_weight
    sums = {
        "loss_sum": metrics.loss * weight,
        "loss_weight": weight,
        "valid_tokens": metrics.valid_tokens,
        "correct_tokens": metrics.correct_tokens,
        "accept_len_sum": metrics.accept_len_sum,
        "valid_blocks": metrics.valid_blocks,
        "batches": jnp.float32(1),
        "batches_without_anchor": (metrics.valid_blocks == 0).astype(jnp.float32),
    }
    if isinstance(metrics, DominoStepMetrics):
        sums |= {
            "final_loss_sum": metrics.final_loss * weight,
            "base_loss_sum": metrics.base_loss * weight,
            "base_correct_tokens": metrics.base_correct_tokens,
            "base_accept_len_sum": metrics.base_accept_len_sum,
        }
    return sums


def metric_means(sums: dict[str, Any]) -> dict[str, float]:
    """Means from added-up `metric_sums`: token-weighted losses, block-weighted acceptance lengths.

    With the counts of `train_step` among the sums, also the mean `grad_norm` of the updates. Without
    anchors the means are 0; where all else was skipped as not finite they are NaN, as is the norm
    where there was no update.
    """
    weight = max(float(sums["loss_weight"]), 1e-6)
    tokens, blocks = max(float(sums["valid_tokens"]), 1.0), max(float(sums["valid_blocks"]), 1.0)
    means = {
        "loss": sums["loss_sum"] / weight,
        "accuracy": sums["correct_tokens"] / tokens,
        "accept_len": sums["accept_len_sum"] / blocks,
    }
    if "final_loss_sum" in sums:
        means |= {
            "final_loss": sums["final_loss_sum"] / weight,
            "base_loss": sums["base_loss_sum"] / weight,
            "base_accuracy": sums["base_correct_tokens"] / tokens,
            "base_accept_len": sums["base_accept_len_sum"] / blocks,
        }
    if sums.get("skipped_nonfinite") and not sums["valid_blocks"]:
        means = dict.fromkeys(means, math.nan)
    counts = ["valid_tokens", "valid_blocks", "batches_without_anchor"]
    if "updates" in sums:
        means["grad_norm"] = sums["grad_norm"] / sums["updates"] if sums["updates"] else math.nan
        counts += ["updates", "skipped_nonfinite"]
    means |= {name: sums[name] for name in counts}
    return {name: float(value) for name, value in means.items()}


class MetricsLog:
    """`metrics.jsonl` and `timing.jsonl` of a run directory and, when asked for, TensorBoard files.

    One record per line: `step`, `split` ("train", "heldout" or "skipped") and its figures.
    `metrics.jsonl` holds what the seed determines: two runs of one configuration write the same
    bytes. What varies between them, times and speeds, is in `timing.jsonl`. A figure that is not
    finite is null there, and `not_finite` names it. Records past the step that a run resumes from
    are dropped, so that each step stands there once.
    """

    def __init__(self, directory: Path, *, from_step: int, tensorboard: bool) -> None:
        self._files = {}
        for name in (METRICS, TIMING):
            path = directory / name
            kept = [line for line in _records(path) if line["step"] <= from_step]
            beside = path.with_suffix(".jsonl.new")
            beside.write_text("".join(_json_line(line) for line in kept))
            beside.replace(path)
            self._files[name] = path.open("a")
        self._board = _tensorboard(directory) if tensorboard else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        if self._board:
            self._board.close()

    def write(self, step: int, split: str, figures: dict[str, Any], *, timing: dict[str, float] | None = None) -> None:
        """Adds one record of `figures`, and one of `timing` if given; on disk when this returns."""
        for name, part in ((METRICS, figures), (TIMING, timing)):
            if part is None:
                continue
            self._files[name].write(_json_line({"step": step, "split": split, **part}))
            self._files[name].flush()
            for figure, value in part.items():
                if self._board and isinstance(value, int | float) and math.isfinite(value):
                    self._board.add_scalar(f"{split}/{figure}", value, step)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, none if there is no such file.

    A line cut off by a crash is left out. Runs of older versions have times in them, and may hold
    NaN.
    """
    return _records(directory / METRICS)


def _records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _json_line(record: dict[str, Any]) -> str:
    odd = [name for name, x in record.items() if isinstance(x, float) and not math.isfinite(x)]
    if odd:  # JSON knows neither NaN nor infinity, and strict readers stop at them
        record = record | dict.fromkeys(odd) | {"not_finite": odd}
    return json.dumps(record, allow_nan=False) + "\n"


def _tensorboard(directory: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError("train.tensorboard needs tensorboardX: pip install 'domino-jax[tensorboard]'") from error
    return SummaryWriter(str(directory / "tensorboard"))
