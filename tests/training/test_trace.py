"""`train.profile`: a trace beside the run, and the same run."""

import json
from pathlib import Path
from typing import Any

import chex
import jax
import pytest
from tiny import Heard, run_config
from whole_run import train

from domino_jax.base.chips import CHIPS, Chip
from domino_jax.base.errors import Interrupted
from domino_jax.config.run import load_config
from domino_jax.training.checkpoint import load_draft
from domino_jax.training.trace import Trace


def start(path: Path, words: list[str], **options: Any) -> str:
    """What a start says."""
    heard = Heard()
    try:
        train(load_config(path, words), reporter=heard, **options)
    except Interrupted as stopped:
        heard.say(str(stopped))
    return heard.text


def traces(run: Path) -> list[Path]:
    return sorted((run / "profile").rglob("*.xplane.pb"))


def test_a_profiled_run_has_the_same_numbers(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHIPS, "cpu", Chip(flops=1e9, memory=2**30, bandwidth=1.0))
    runs, said = [], []
    for name, words in (("plain", []), ("profiled", ["train.profile=[3, 2]"])):
        (tmp_path / name).mkdir()
        settings = {"tensorboard": True, "checkpoint_every": 6}
        path = run_config(tmp_path / name, target, train=settings, data={"eval": None})
        said.append(start(path, words))
        runs.append(tmp_path / name / "run")
    plain, profiled = runs
    (trace,) = traces(profiled)
    planes = {p.name: list(p.lines) for p in jax.profiler.ProfileData.from_file(str(trace)).planes}
    assert any(list(line.events) for line in planes["/host:CPU"])
    assert not traces(plain) and "traced" not in said[0]
    place = profiled / "profile"
    assert f"steps 3 to 4 are traced in {place}" in said[1]
    assert f"tensorboard --logdir {place}" in said[1]
    assert (plain / "metrics.jsonl").read_bytes() == (profiled / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(*(load_draft(run).params for run in runs))

    # What this machine's chip would give, everywhere that figures are shown.
    timing = [json.loads(line) for line in (profiled / "timing.jsonl").read_text().splitlines()]
    assert len(timing) == 3 and all(line["mfu"] > 0 for line in timing)
    assert f"tokens/s  MFU {timing[-1]['mfu']:.1%}" in said[1]
    (board,) = (profiled / "tensorboard").iterdir()
    for figure in ("samples_per_second", "supervised_tokens_per_second", "mfu"):
        assert f"train/{figure}".encode() in board.read_bytes()


@pytest.mark.slow
def test_a_trace_ends_with_a_run_that_is_stopped_and_may_change_with_the_next_start(
    target: Path, tmp_path: Path
) -> None:
    path = run_config(tmp_path, target, data={"eval": None})
    answers = iter([False, False, True])
    said = start(path, ["train.profile=[2, 4]"], stop_requested=lambda: next(answers))
    assert "steps 2 to 3 are traced" in said and "stopped at step 3 of 6" in said
    assert len(traces(tmp_path / "run")) == 1
    # The profiler is free again, for what is left of a range.
    said = start(path, ["train.profile=[1, 4]"])
    assert "steps 4 to 4 are traced" in said and len(traces(tmp_path / "run")) == 2
    assert "already trained for 6 steps" in start(path, ["train.profile=[1, 4]"])


@pytest.mark.parametrize(
    ("profile", "done", "expected"),
    [
        ([3, 2], 0, [3, 4]),
        ([5, 9], 0, [5, 6]),
        ([1, 4], 2, [3, 4]),
        ([6, 1], 5, [6]),
        ([7, 2], 0, "no trace of steps 7 to 8: this start goes from step 0 to 6"),
        ([1, 2], 2, "no trace of steps 1 to 2: this start goes from step 2 to 6"),
        (None, 0, []),
    ],
)
def test_the_steps_that_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: Any, done: int, expected: Any
) -> None:
    running: list[Any] = []
    monkeypatch.setattr(jax.profiler, "start_trace", running.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    said: list[str] = []

    class Paused:
        """Stands for the wait at both ends."""

        def __init__(self, state: int) -> None:
            said.append(f"waited for {state}")

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    traced = []
    coming = range(done + 1, 7)
    with Trace(tmp_path, profile, coming, paused=Paused, reporter=Heard(lines=said)) as trace:
        for step in coming:
            trace.before(step, step - 1)
            traced += [step] if running else []
            trace.after(step, step)
    assert not running
    if isinstance(expected, str):
        assert not traced and said == [f"train.profile: {expected}"]
        return
    assert traced == expected
    if not expected:
        assert not said
        return
    first, last = expected[0], expected[-1]
    assert said[:2] == [f"waited for {first - 1}", f"waited for {last}"]
    assert said[2].startswith(f"steps {first} to {last} are traced in {tmp_path / 'profile'}")
