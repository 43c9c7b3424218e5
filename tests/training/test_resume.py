"""A run that is stopped or killed resumes and ends with the same bits."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from saved_bits import final_bits
from tiny import quiet, run_config
from whole_run import train

from domino_jax.base.errors import Interrupted
from domino_jax.base.lock import LOCK
from domino_jax.config.run import load_config
from domino_jax.training.checkpoint import load_draft
from domino_jax.training.log import read_metrics


class Stop:
    """Asks a run to stop, at its n-th question."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0


# The window of the log, checkpoints and held-out passes fall apart.
STEPS = {"steps": 11, "log_every": 5, "checkpoint_every": 4, "eval_every": 3}
ODD: dict[str, Any] = {"optimizer": {"ema_decay": 0.9}, "train": {**STEPS, "keep_checkpoints": 9}}


@pytest.fixture(scope="module")
def whole(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `ODD` that was never stopped."""
    directory = tmp_path_factory.mktemp("whole")
    return train(load_config(run_config(directory, target, **ODD)), reporter=quiet())


def test_a_resumed_run_holds_one_state(target: Path, tmp_path: Path) -> None:
    """Parameters and two moments: a second, fresh state beside them would be gigabytes."""
    config = load_config(run_config(tmp_path, target, train={"steps": 4, "checkpoint_every": 1}))
    with pytest.raises(Interrupted):
        train(config, reporter=quiet(), stop_requested=Stop(1))
    gc.collect()
    rows = (config.draft.gru_hidden_dim * 3, config.draft.gru_hidden_dim)  # of the GRU's weight_hh
    before = sum(array.shape == rows for array in jax.live_arrays())
    held: list[int] = []

    def count() -> bool:
        held.append(sum(array.shape == rows for array in jax.live_arrays()) - before)
        return False

    train(config, reporter=quiet(), stop_requested=count)
    assert held and set(held) == {3}


def assert_same_run(one: Path, other: Path, *, step: int) -> None:
    chex.assert_trees_all_equal(final_bits(one, step), final_bits(other, step))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.pitfall(
    "resume replays the epoch or loses the order",
    seen=(
        "training/checkpoint.py: `data` left out of what is restored; training/loop.py: a fresh "
        "iterator after restoring; another shuffle seed after a restart; saved after the next "
        "rows were taken"
    ),
)
@pytest.mark.pitfall(
    "the log of a resumed run differs from that of an undisturbed one",
    seen=(
        "training/loop.py: a new window after a start; the held-out pass that was cut off left out"
    ),
)
@pytest.mark.parametrize("stops", [[2, 3], pytest.param([1] * 12, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_ends_with_the_same_bits(
    whole: Path, target: Path, tmp_path: Path, stops: list[int]
) -> None:
    """Wherever it is: in a window of the log, in the midst of a held-out pass, at the last step."""
    config = load_config(run_config(tmp_path, target, **ODD))
    for at in stops:
        try:
            train(config, reporter=quiet(), stop_requested=Stop(at))
        except Interrupted as stopped:
            assert "the same command resumes there" in str(stopped)
    train(config, reporter=quiet())
    assert_same_run(whole, tmp_path / "run", step=11)
    # The average is what leaves the run.
    exported = load_draft(tmp_path / "run").params
    raw = final_bits(tmp_path / "run", 11)["params"]
    pairs = zip(*map(jax.tree.leaves, (exported, raw)), strict=True)
    assert any(not np.array_equal(average, last) for average, last in pairs)


def test_every_stop_saves_its_step(target: Path, tmp_path: Path) -> None:
    config = load_config(
        run_config(tmp_path, target, train={"checkpoint_every": 100}, data={"eval": None})
    )
    for step in (1, 2):
        with pytest.raises(Interrupted, match=f"stopped at step {step} of 6"):
            train(config, reporter=quiet(), stop_requested=Stop(0))
        assert load_draft(tmp_path / "run").step == step
    # Of the data and of step 2: a stop writes no line of its own.
    assert len(read_metrics(tmp_path / "run")) == 2


@pytest.mark.pitfall(
    "resume replays the epoch or loses the order",
    seen=(
        "training/loop.py: saved after the next rows were taken, except by the last step (fails "
        "after SIGKILL)"
    ),
)
@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_process_goes_on_with_the_same_bits(
    domino, target: Path, tmp_path: Path, number: int
) -> None:
    """A real process, killed in the middle of training; its run goes on in another one."""
    steps = {"steps": 80, "checkpoint_every": 5, "log_every": 10, "eval_every": 80}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    train(load_config(run_config(whole, target, train=steps)), reporter=quiet())
    # What is killed must not leave half a program for others to read.
    environment = {**os.environ, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}
    path = run_config(killed, target, train=steps)
    process = subprocess.Popen(
        [sys.executable, "-m", "domino_jax", "train", str(path)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints = killed / "run" / "checkpoints"
    deadline = time.monotonic() + 120
    while not (
        checkpoints.is_dir() and any(entry.name.isdigit() for entry in checkpoints.iterdir())
    ):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint came"
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGTERM else -signal.SIGKILL), errors
    lock = killed / "run" / LOCK
    assert lock.exists() == (number == signal.SIGKILL)
    code, _, log = domino("train", path)
    assert code == 0 and re.search(r"resuming at step \d+ of 80", log), log
    assert not lock.exists()
    assert_same_run(whole / "run", killed / "run", step=80)
