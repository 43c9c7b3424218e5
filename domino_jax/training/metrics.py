"""What a run measured: sums that add up over batches, means made from them last, and the log they are written to."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from domino_jax.strict import InputError
from domino_jax.training.modules import DFlashStepMetrics, DominoStepMetrics


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
    """Means from added-up `metric_sums`: token-weighted losses and accuracies, block-weighted acceptance lengths."""
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
    means |= {name: sums[name] for name in ("valid_tokens", "valid_blocks", "batches_without_anchor")}
    return {name: float(value) for name, value in means.items()}


class MetricsLog:
    """`metrics.jsonl` of a run directory and, when asked for, TensorBoard files beside it.

    One record per line: `step`, `split` ("train" or "heldout") and the figures. Records past the step that a run
    resumes from are dropped, so that each step stands there once.
    """

    def __init__(self, directory: Path, *, from_step: int, tensorboard: bool) -> None:
        path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(directory) if line["step"] <= from_step]
        beside = path.with_suffix(".jsonl.new")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        beside.replace(path)
        self._board = _tensorboard(directory) if tensorboard else None
        self._file = path.open("a")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def write(self, step: int, split: str, figures: dict[str, float]) -> None:
        """Adds one record; it is on disk when this returns."""
        self._file.write(json.dumps({"step": step, "split": split, **figures}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in figures.items():
                self._board.add_scalar(f"{split}/{name}", value, step)


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`, none if there is no such file; a line cut off by a crash is left out."""
    path = directory / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _tensorboard(directory: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError("train.tensorboard needs tensorboardX: pip install 'domino-jax[tensorboard]'") from error
    return SummaryWriter(str(directory / "tensorboard"))
