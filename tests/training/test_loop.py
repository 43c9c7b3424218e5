"""Whole short runs: one compilation, and a killed run resumes and ends with the same bits."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny import CONFIG, run_config, seal, write_conversations, write_target

from domino_jax.config.run import dump_config, load_config
from domino_jax.formats.safetensors import StoredTensor
from domino_jax.strict import InputError
from domino_jax.target.load import load_target
from domino_jax.target.model import Target
from domino_jax.training import loop, program
from domino_jax.training.checkpoint import load_draft, open_checkpoints
from domino_jax.training.inputs import device_batch
from domino_jax.training.loop import Interrupted, train
from domino_jax.training.metrics import read_metrics
from domino_jax.training.prepare import prepare
from domino_jax.training.start import draft_from_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"))


def quiet() -> Console:
    return Console(file=io.StringIO())


def final_bits(run_dir: Path, step: int) -> Any:
    with open_checkpoints(run_dir) as checkpoints:
        assert checkpoints.latest_step() == step
        import orbax.checkpoint as ocp

        names = ("params", "optimizer", "ema")
        there = [name for name in names if (run_dir / "checkpoints" / str(step) / name).is_dir()]
        items = {name: ocp.args.StandardRestore() for name in there}
        return jax.device_get(dict(checkpoints.restore(step, args=ocp.args.Composite(**items))))


class Stop:
    """Asks a run to stop, at its n-th question."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self) -> bool:
        self._left -= 1
        return self._left < 0


# The window of the log, checkpoints and held-out passes fall apart.
ODD: dict[str, Any] = {
    "optimizer": {"ema_decay": 0.9},
    "train": {
        "steps": 11,
        "log_every": 5,
        "checkpoint_every": 4,
        "eval_every": 3,
        "keep_checkpoints": 9,
    },
}


@pytest.fixture(scope="module")
def whole(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `ODD` that was never stopped."""
    directory = tmp_path_factory.mktemp("whole")
    return train(load_config(run_config(directory, target, **ODD)), console=quiet())


def assert_same_run(one: Path, other: Path, *, step: int) -> None:
    chex.assert_trees_all_equal(final_bits(one, step), final_bits(other, step))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stops", [[2, 3], pytest.param([1] * 12, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_ends_with_the_same_bits(
    whole: Path, target: Path, tmp_path: Path, stops: list[int]
) -> None:
    """Wherever it is: in a window of the log, in the midst of a held-out pass, at the last step."""
    config = load_config(run_config(tmp_path, target, **ODD))
    for at in stops:
        try:
            train(config, console=quiet(), stop_requested=Stop(at))
        except Interrupted as stopped:
            assert "the same command goes on from there" in str(stopped)
    train(config, console=quiet())
    assert_same_run(whole, tmp_path / "run", step=11)
    # The average is what leaves the run.
    exported = load_draft(tmp_path / "run")[1]
    raw = final_bits(tmp_path / "run", 11)["params"]
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (exported, raw)), strict=True)
    )


def test_every_stop_saves_its_step(target: Path, tmp_path: Path) -> None:
    config = load_config(
        run_config(tmp_path, target, train={"checkpoint_every": 100}, data={"heldout": None})
    )
    for step in (1, 2, 3):
        with pytest.raises(Interrupted, match=f"stopped at step {step} of 6"):
            train(config, console=quiet(), stop_requested=Stop(0))
        assert load_draft(tmp_path / "run")[2] == step
    assert not read_metrics(tmp_path / "run")[1:]  # of step 2; a stop writes no line of its own


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_killed_process_goes_on_with_the_same_bits(
    target: Path, tmp_path: Path, number: int
) -> None:
    """A real process, killed in the middle of training and started again."""
    steps = {"train": {"steps": 200, "checkpoint_every": 10, "log_every": 10, "eval_every": 200}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for directory in (whole, killed):
        directory.mkdir()
    command = [sys.executable, "-c", "from domino_jax.cli import main; main()", "train"]
    # One device, compiled as quickly as elsewhere in the suite.
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run([*command, str(run_config(whole, target, **steps))], env=environment, check=True)
    # What is killed must not leave half a program for others to read.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "1e9"
    path = run_config(killed, target, **steps)
    process = subprocess.Popen(
        [*command, str(path)], env=environment, stderr=subprocess.PIPE, text=True
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
    again = subprocess.run(
        [*command, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert "resuming at step" in again.stderr
    chex.assert_trees_all_equal(final_bits(whole / "run", 200), final_bits(killed / "run", 200))


def test_an_unfinished_save_is_never_picked_up(target: Path, tmp_path: Path) -> None:
    config = load_config(run_config(tmp_path, target))
    train(config, console=quiet())
    leftover = tmp_path / "run" / "checkpoints" / "8.orbax-checkpoint-tmp"
    (leftover / "params").mkdir(parents=True)
    assert load_draft(tmp_path / "run")[2] == 6
    console = quiet()
    train(config, console=console)
    assert "resuming at step 6 of 6" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_loss_falls_and_everything_is_logged(target: Path, tmp_path: Path) -> None:
    steps = {
        "steps": 60,
        "log_every": 20,
        "eval_every": 30,
        "checkpoint_every": 60,
        "tensorboard": True,
    }
    path = run_config(tmp_path, target, train=steps, optimizer={"learning_rate": 1e-2})
    console = quiet()
    directory = train(load_config(path), console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    begun = ("loading rows", "loading target", "step compiled in", "saving checkpoint 60")
    places = [said.index(words) for words in begun]
    assert places == sorted(places) and [said.count(words) for words in begun] == [1] * 4
    lines = read_metrics(directory)
    training = [line for line in lines if line["split"] == "train"]
    heldout = [line for line in lines if line["split"] == "heldout"]
    assert [line["step"] for line in training] == [20, 40, 60] and [
        line["step"] for line in heldout
    ] == [30, 60]
    assert training[-1]["loss"] < training[0]["loss"]
    assert training[-1]["lambda_base"] == pytest.approx(1 / 60)
    names = {
        "loss",
        "final_loss",
        "base_loss",
        "accept_len",
        "base_accept_len",
        "grad_norm",
        "batches_without_anchor",
    }
    assert names | {"updates", "skipped_nonfinite"} <= training[0].keys()
    # Speeds stand apart, and count tokens, not padding: 20 steps of 8 are 6 epochs of 24 rows and
    # 16 rows more.
    timing = [json.loads(line) for line in (directory / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in timing] == [20, 40, 60] and not timing[0].keys() & training[
        0
    ].keys() - {
        "step",
        "split",
    }
    tokens = [line["tokens_per_second"] * line["seconds_per_step"] * 20 for line in timing]
    lengths = [len(row.input_ids) for row in prepare(load_config(path), console=quiet()).rows.rows]
    assert sum(tokens) == pytest.approx(60 * 8 / 24 * sum(lengths))
    for line, figures in zip(timing, training, strict=True):
        assert line["samples_per_second"] == pytest.approx(8 / line["seconds_per_step"])
        supervised = line["supervised_tokens_per_second"] * line["seconds_per_step"] * 20
        assert supervised == pytest.approx(figures["valid_tokens"])
        assert not {"mfu", "peak_memory_bytes"} & line.keys()  # nothing is published of this chip
    assert list((directory / "tensorboard").iterdir())
    # As it was resolved: where none were given, the objective's own decay and a CPU's memory.
    stored, given = load_config(directory / "config.yaml"), load_config(path)
    resolved = dataclasses.replace(
        given.loss, loss_decay_gamma=7.0, logits_mib=program.CPU_LOGITS_MIB
    )
    assert stored == dataclasses.replace(given, loss=resolved)


def test_the_step_is_compiled_once(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the held-out pass too, though some batches are more than twice as long as others."""
    path = run_config(tmp_path, target, data={"max_length": 64}, optimizer={"grad_accumulation": 2})
    long = write_conversations(tmp_path / "long.jsonl", 1, rounds=3).read_text()
    for rows in (tmp_path / "rows.jsonl", tmp_path / "heldout.jsonl"):
        rows.write_text(2 * rows.read_text() + long)
    traces: list[str] = []
    longest: dict[int, list[int]] = {
        1: [],
        2: [],
    }  # of each batch, by the micro-batches: held-out rows have 1

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
    count_traces(loop, "batch_metrics")
    monkeypatch.setattr(loop, "device_batch", put)
    train(load_config(path), console=quiet())
    assert sorted(traces) == ["batch_metrics", "train_step"]
    assert [len(longest[1]), len(longest[2])] == [4, 6]
    assert all(2 * min(lengths) < max(lengths) for lengths in longest.values())


def test_the_resolved_recipe_is_printed_and_stored(target: Path, tmp_path: Path) -> None:
    console = quiet()
    config = prepare(load_config(run_config(tmp_path, target)), console=console).config
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "loss_decay_gamma: 7.0" in said and dump_config(config) in said
    assert (tmp_path / "run" / "config.yaml").read_text() == dump_config(config)


def test_a_run_directory_belongs_to_its_settings(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target)
    train(load_config(path), console=quiet())
    with pytest.raises(InputError, match=r"draft\.mask_token_id 2 -> 9.*use another run_dir"):
        train(load_config(path, ["draft.mask_token_id=9"]), console=quiet())
    train(load_config(path, ["train.log_every=1"]), console=quiet())  # changes no number


def test_a_run_of_another_version_is_not_resumed(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target)
    train(load_config(path), console=quiet())
    for step in ("4", "6"):
        checkpoint = tmp_path / "run" / "checkpoints" / step
        stored = checkpoint / "run" / "metadata"
        stored.write_text(stored.read_text().replace('"options": {}', '"dpace_alpha": 0.5'))
        seal(checkpoint)
    with pytest.raises(InputError, match=r"unknown key 'dpace_alpha'.*another version.*run_dir"):
        train(load_config(path), console=quiet())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("draft.mask_token_id=0", "mask_token_id 0 is the target's eos token"),
        ("draft.mask_token_id=32", "mask_token_id 32 is outside the vocabulary of 32"),
        ("draft.target_layer_ids=[0,4]", r"target_layer_ids \[0, 4\] must lie in 0..3"),
        ("data.train=missing.jsonl", "missing.jsonl"),
        ("data.batch_size=12", "multiple of its 8 devices"),
        ("mesh.tensor=3", "mesh"),
        ("target=nowhere", "nowhere"),
        ("loss.loss_type=focal", "loss: loss_type must be one of dflash, .*found 'focal'"),
    ],
)
def test_unusable_settings_are_one_line(
    target: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(load_config(run_config(tmp_path, target), [override]), console=quiet())


def test_bad_lines_are_named_and_left_out(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("not JSON\n" + rows.read_text())
    console = quiet()
    run = prepare(load_config(path), console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert len(run.rows.rows) == 24 and "rows.jsonl:1:" in said and "1 of 25 lines left out" in said


def test_epochs_give_the_number_of_steps(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target, train={"steps": None, "epochs": 2})
    assert (
        prepare(load_config(path), console=quiet()).total_steps == 6
    )  # 2 epochs of 24 rows, 8 a step


def test_draft_from_target_starts_as_the_top_of_the_target(target: Path, tmp_path: Path) -> None:
    run = prepare(load_config(run_config(tmp_path, target)), console=quiet())
    params, loaded = jax.device_get(run.state.params), load_target(target)
    started = jax.device_get(draft_from_target(run.record.config, params, loaded.params))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, started)
    chex.assert_trees_all_equal(started["layers_0"], jax.device_get(loaded.params["layers_3"]))
    chex.assert_trees_all_equal(started["norm"], jax.device_get(loaded.params["norm"]))
    states = (
        np.random.default_rng(0).standard_normal((2, 2 * CONFIG.hidden_size)).astype(np.float32)
    )
    np.testing.assert_array_equal(
        states @ started["fc"]["weight"].T, states[:, CONFIG.hidden_size :]
    )
    assert started["head"] is params["head"] or np.array_equal(
        started["head"]["embed_proj_2"], params["head"]["embed_proj_2"]
    )


def test_draft_from_target_takes_what_a_dense_draft_has(target: Path, tmp_path: Path) -> None:
    run = prepare(load_config(run_config(tmp_path, target)), console=quiet())
    params = jax.device_get(run.state.params)
    mixture = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    config = dataclasses.replace(CONFIG, attention_bias=True, **mixture)
    boxed = Target(config).init(jax.random.key(3), jnp.zeros((1, 2), jnp.int32))["params"]
    theirs = jax.device_get(nn.meta.unbox(boxed))
    started = jax.device_get(draft_from_target(run.record.config, params, theirs))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, started)
    chex.assert_trees_all_equal(started["layers_0"]["mlp"], params["layers_0"]["mlp"])
    for name in ("q_proj", "o_proj"):
        weight = theirs["layers_3"]["self_attn"][name]["weight"]
        np.testing.assert_array_equal(started["layers_0"]["self_attn"][name]["weight"], weight)


def test_a_run_starts_as_the_top_of_its_target_and_reads_no_more_of_it(
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = run_config(tmp_path, target)
    fresh = prepare(load_config(path), console=quiet())
    read, names = StoredTensor.read, []

    def noted(tensor: StoredTensor, part: tuple[slice, ...] = ()) -> np.ndarray:
        names.append(tensor.name)
        return read(tensor, part)

    monkeypatch.setattr(StoredTensor, "read", noted)
    start, devices = "draft.init_layers_from_target=true", ("mesh.fsdp=8", "mesh.data=1")
    config = load_config(path, [start, "dtype=bfloat16", *devices])
    run = prepare(config, console=quiet())
    counts = Counter(names)
    # Three layers run; of the fourth, and of the final norm, the draft has its copy in float32.
    whole = load_target(target).params
    expected = draft_from_target(fresh.record.config, fresh.state.params, whole)
    chex.assert_trees_all_equal(*jax.device_get((run.state.params, expected)))
    layout = run.state.params["layers_0"]["mlp"]["up_proj"]["weight"].sharding
    assert not layout.is_fully_replicated
    assert any(".layers.3." in name for name in counts)
    assert counts["model.embed_tokens.weight"] == 8 and counts["model.norm.weight"] == 2


def test_the_metrics_log_drops_what_a_resumed_run_does_again(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target)
    train(load_config(path), console=quiet())
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text(
        log.read_text() + json.dumps({"step": 9, "split": "train"}) + '\n{"step": 10, "spl'
    )
    train(load_config(path), console=quiet())
    assert max(line["step"] for line in read_metrics(tmp_path / "run")) == 6


def test_too_few_rows_is_one_line(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target)
    write_conversations(tmp_path / "rows.jsonl", 3)
    with pytest.raises(InputError, match="3"):
        train(load_config(path), console=quiet())
