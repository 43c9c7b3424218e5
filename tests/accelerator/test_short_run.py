"""One epoch of a tiny run in bfloat16: rows, devices, held-out metrics and checkpoints together."""

import json
import math
from pathlib import Path

import pytest
from tiny import quiet, run_config, write_target
from whole_run import train

from domino_jax.config.run import load_config
from domino_jax.training.checkpoint import load_draft

pytestmark = pytest.mark.accelerator


def test_one_epoch_trains_measures_and_saves(tmp_path: Path) -> None:
    pytest.importorskip("grain", reason="needs grain for its batches: pip install grain")
    target = write_target(tmp_path / "target")
    settings = {"steps": None, "epochs": 1, "log_every": 1, "eval_every": 3}
    config = load_config(run_config(tmp_path, target, dtype="bfloat16", train=settings))
    run = train(config, reporter=quiet())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["step"]]
    assert len(losses) == 4  # 24 rows in batches of 8, and one held-out pass
    assert all(map(math.isfinite, losses))
    draft = load_draft(run)
    assert draft.step == 3 and draft.record.config.dtype == "bfloat16"
