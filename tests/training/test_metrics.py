"""The log of a run: JSON that any reader takes, times apart, and files of older runs."""

import json
import math
from pathlib import Path
from typing import Any

from domino_jax.training.metrics import MetricsLog, read_metrics


def refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def strictly(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_figures_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, from_step=0, tensorboard=True) as log:
        log.write(2, "train", {"loss": math.nan, "grad_norm": math.inf, "accept_len": 1.5, "updates": 0.0})
    assert strictly(tmp_path / "metrics.jsonl") == [
        {"step": 2, "split": "train", "loss": None, "grad_norm": None, "accept_len": 1.5, "updates": 0.0}
        | {"not_finite": ["loss", "grad_norm"]}
    ]


def test_times_stand_apart_and_both_files_drop_what_is_done_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, from_step=0, tensorboard=False) as log:
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": 0.5}, timing={"seconds_per_step": 0.1})
        log.write(3, "heldout", {"loss": 0.25})
    with MetricsLog(tmp_path, from_step=2, tensorboard=False) as log:
        log.write(3, "train", {"loss": 0.125}, timing={"seconds_per_step": 0.2})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 0.5), (2, 0.5), (3, 0.125)]
    timing = strictly(tmp_path / "timing.jsonl")
    assert [(line["step"], line["split"], line["seconds_per_step"]) for line in timing] == [
        (1, "train", 0.1),
        (2, "train", 0.1),
        (3, "train", 0.2),
    ]


def test_a_log_of_an_older_run_is_taken_up(tmp_path: Path) -> None:
    """It has times among its figures, may hold NaN, has no timing.jsonl, and ends where it was cut off."""
    old = '{"step": 1, "split": "train", "loss": NaN, "tokens_per_second": 5.0}\n{"step": 2, "spl'
    (tmp_path / "metrics.jsonl").write_text(old)
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])
    with MetricsLog(tmp_path, from_step=1, tensorboard=False) as log:
        log.write(2, "train", {"loss": 0.5}, timing={"seconds_per_step": 0.1})
    first, second = strictly(tmp_path / "metrics.jsonl")
    assert first["loss"] is None and first["tokens_per_second"] == 5.0 and second["loss"] == 0.5
