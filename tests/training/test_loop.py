"""Whole short runs: one compilation, falling loss, logs, and settings that cannot run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import fields_of
from tiny import Heard, quiet, run_config, write_conversations
from whole_run import train

from domino_jax.config.run import load_config
from domino_jax.training import eval as teacher_forced
from domino_jax.training import loop, program
from domino_jax.training.inputs import device_batch
from domino_jax.training.log import read_metrics
from domino_jax.training.prepare import prepare


@pytest.mark.pitfall(
    "gamma None silently off or on",
    seen=(
        "training/prepare.py: the recipe not printed; training/run_directory.py: only run_dir "
        "stored"
    ),
)
def test_the_loss_falls_and_everything_is_logged(target: Path, tmp_path: Path) -> None:
    steps = {"steps": 30, "log_every": 10, "eval_every": 15, "checkpoint_every": 30}
    steps |= {"tensorboard": True}
    path = run_config(tmp_path, target, train=steps, optimizer={"learning_rate": 1e-2})
    heard = Heard()
    run = prepare(load_config(path), reporter=heard)
    directory = loop.train(run, reporter=heard)
    said = heard.text
    begun = ("loading rows", "loading target", "step compiled in", "saving checkpoint 30")
    places = [said.index(words) for words in begun]
    assert places == sorted(places) and [said.count(words) for words in begun] == [1] * 4
    lines = read_metrics(directory)
    first = lines[0]
    assert first["split"] == "data" and first["conversations"] == 24 and first["answer_tokens"] > 24
    assert first.keys() == fields_of("data")
    training = [line for line in lines if line["split"] == "train"]
    heldout = [line for line in lines if line["split"] == "heldout"]
    assert [line["step"] for line in training] == [10, 20, 30]
    assert [line["step"] for line in heldout] == [15, 30]
    assert training[-1]["loss"] < training[0]["loss"]
    assert training[-1]["lambda_base"] == pytest.approx(1 / 30)
    assert training[0].keys() == fields_of("train") and heldout[0].keys() == fields_of("heldout")
    # Speeds stand apart, and count tokens, not padding: 30 steps of 8 are 10 epochs of 24 rows.
    timing = [json.loads(line) for line in (directory / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == [10, 20, 30]
    assert timing[0].keys() & training[0].keys() == {"step", "split"}
    tokens = [line["tokens_per_second"] * line["seconds_per_step"] * 10 for line in timing]
    lengths = [len(row.input_ids) for row in run.inputs.rows.rows]
    assert sum(tokens) == pytest.approx(30 * 8 / 24 * sum(lengths))
    for line, figures in zip(timing, training, strict=True):
        assert line["samples_per_second"] == pytest.approx(8 / line["seconds_per_step"])
        supervised = line["supervised_tokens_per_second"] * line["seconds_per_step"] * 10
        assert supervised == pytest.approx(figures["valid_tokens"])
        # Nothing is published of this chip.
        assert line.keys() == fields_of("timing") - {"mfu", "peak_memory_bytes"}
    assert list((directory / "tensorboard").iterdir())
    # Printed and stored as it was resolved: where none were given, the objective's own settings and
    # a CPU's memory.
    text = (directory / "config.yaml").read_text()
    assert text in said and "loss_decay_gamma: 7.0" in text
    stored, given = load_config(directory / "config.yaml"), load_config(path)
    resolved = dataclasses.replace(
        given.loss, loss_decay_gamma=7.0, normalize="weights", logits_mib=program.CPU_LOGITS_MIB
    )
    assert stored == dataclasses.replace(given, loss=resolved)
    assert dataclasses.asdict(stored) == run.inputs.settings


@pytest.mark.pitfall(
    "shapes that depend on the data: recompilation late in an epoch",
    seen=(
        "data/pipeline.py: padded to the longest of a batch; training/loop.py: the step jitted "
        "anew every time; the held-out pass jitted anew every time"
    ),
)
def test_the_step_is_compiled_once(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the held-out pass too, though some batches are more than twice as long as others."""
    path = run_config(tmp_path, target, data={"max_length": 64}, optimizer={"grad_accumulation": 2})
    long = write_conversations(tmp_path / "long.jsonl", 1, rounds=3).read_text()
    for rows in (tmp_path / "rows.jsonl", tmp_path / "heldout.jsonl"):
        rows.write_text(2 * rows.read_text() + long)
    traces: list[str] = []
    longest: dict[int, list[int]] = {1: [], 2: []}  # by micro-batches: held-out rows have 1

    def count_traces(module: Any, name: str) -> None:
        traced = getattr(module, name)

        def counted(*args: Any, **options: Any) -> Any:
            traces.append(name)
            return traced(*args, **options)

        monkeypatch.setattr(module, name, counted)

    def put(mesh: Any, rows: dict[str, np.ndarray], *, micro_batches: int) -> Any:
        assert rows["input_ids"].shape == rows["loss_mask"].shape == (8 * micro_batches, 64)
        longest[micro_batches].append(int(np.flatnonzero(rows["loss_mask"].any(axis=0))[-1]))
        return device_batch(mesh, rows, micro_batches=micro_batches)

    count_traces(program, "train_step")
    count_traces(teacher_forced, "batch_metrics")
    for module in (loop, teacher_forced):
        monkeypatch.setattr(module, "device_batch", put)
    train(load_config(path), reporter=quiet())
    assert sorted(traces) == ["batch_metrics", "train_step"]
    assert [len(longest[1]), len(longest[2])] == [4, 6]
    assert all(2 * min(lengths) < max(lengths) for lengths in longest.values())


def test_bad_lines_are_named_and_left_out(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("not JSON\n" + rows.read_text())
    heard = Heard()
    run = prepare(load_config(path), reporter=heard).inputs
    said = heard.text
    assert (
        len(run.rows.rows) == 24
        and "rows.jsonl:1:" in said
        and "1 of 25 lines hold an answer" in said
    )
