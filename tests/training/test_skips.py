"""A NaN is never trained on: lines are named, a run stops if it stays, checkpoints are finite."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from documents import fields_of
from safetensors.numpy import load_file, save_file
from strict_json import strictly
from tiny import WORDS, Heard, quiet, run_config, write_target
from whole_run import train

from domino_jax.base.errors import Diverged, Interrupted, Untrained
from domino_jax.config.run import load_config
from domino_jax.data.conversations import Row
from domino_jax.page.terminal import training_summary
from domino_jax.training.accumulator import StepOutcome
from domino_jax.training.checkpoint import open_checkpoints, sound_checkpoint
from domino_jax.training.log import read_metrics
from domino_jax.training.optimizer import learning_rate_schedule
from domino_jax.training.skips import StepWatch, divergence, no_update


def edit(target: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """A target whose tensors are changed in its file; they must stay finite to be read."""
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def overflow(tensors: dict[str, np.ndarray]) -> None:
    """The first layer overflows on every row."""
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 3e38


def overflow_on_unk(tensors: dict[str, np.ndarray]) -> None:
    """The first layer overflows where a row has the unknown word.

    It alone has something in the first dimension, which the layer multiplies by a large number.
    """
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][WORDS.index("<unk>"), 0] = 1e3
    tensors["model.layers.0.self_attn.o_proj.weight"][0] = 0
    tensors["model.layers.0.mlp.up_proj.weight"][:, 0] = 3e38


def assert_checkpoints_are_finite(run_dir: Path) -> list[int]:
    import orbax.checkpoint as ocp

    with open_checkpoints(run_dir) as checkpoints:
        steps = list(checkpoints.all_steps())
        for step in steps:
            items = {name: ocp.args.StandardRestore() for name in ("params", "optimizer")}
            stored = checkpoints.restore(step, args=ocp.args.Composite(**items))
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(dict(stored)))
    return steps


@pytest.mark.pitfall(
    "a NaN is trained on, saved, and the good checkpoints are rotated away",
    seen=(
        "training/step.py: taken whatever loss and norm are; base/files.py: lines counted without "
        "empty ones"
    ),
)
def test_a_poisoned_line_is_named_skipped_and_survived(tmp_path: Path) -> None:
    """Line 8 alone has a token that overflows: of each epoch's three batches one is skipped."""
    target = edit(write_target(tmp_path / "target"), overflow_on_unk)
    path = run_config(tmp_path, target, train={"log_every": 3, "checkpoint_every": 1})
    rows = tmp_path / "rows.jsonl"
    lines = rows.read_text().splitlines()
    question = {"role": "user", "content": "unheard"}
    messages = [question, {"role": "assistant", "content": "a b c d e f"}]
    lines[6:7] = ["", json.dumps({"messages": messages})]  # an empty line counts, and gives no row
    rows.write_text("\n".join(lines) + "\n")
    heard = Heard()
    config = load_config(path)
    run = train(config, reporter=heard)
    said = heard.text

    skipped = [line for line in strictly(run / "metrics.jsonl") if line["split"] == "skipped"]
    assert len(skipped) == 2 and skipped[0]["step"] <= 3 < skipped[1]["step"]
    for skip in skipped:
        assert skip["reason"] == "nonfinite" and 8 in skip["lines"] and len(skip["lines"]) == 8
        assert 7 not in skip["lines"]
        assert f"step {skip['step']}: update skipped, its loss" in said
    windows = [line for line in read_metrics(run) if line["split"] == "train"]
    assert [(w["updates"], w["skipped_nonfinite"]) for w in windows] == [(2, 1), (2, 1)]
    assert all(np.isfinite(w["loss"]) and np.isfinite(w["grad_norm"]) for w in windows)
    # The schedule counts updates, lambda batches.
    settings = config.optimizer
    schedule = learning_rate_schedule(
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        min_lr_ratio=settings.min_lr_ratio,
        total_steps=6,
    )
    assert windows[-1]["learning_rate"] == float(schedule(3))
    assert windows[-1]["lambda_base"] == pytest.approx(1 / 6)
    assert assert_checkpoints_are_finite(run) == [5, 6]


@pytest.mark.pitfall(
    "a NaN is trained on, saved, and the good checkpoints are rotated away",
    seen="training/skips.py: never too many",
)
@pytest.mark.parametrize(
    ("override", "first"), [("target", 1), ("optimizer.learning_rate=1e30", 2)]
)
def test_a_run_that_goes_astray_stops_with_finite_checkpoints(
    tmp_path: Path, override: str, first: int
) -> None:
    target, words = write_target(tmp_path / "target"), [override]
    if override == "target":
        edit(target, overflow)
        words = []
    settings = {"log_every": 2, "checkpoint_every": 1, "keep_checkpoints": 9}
    path = run_config(tmp_path, target, train={**settings, "max_nonfinite_steps": 3})
    with pytest.raises(Diverged) as raised:
        train(load_config(path, words), reporter=quiet())
    said = str(raised.value)
    many = "stopped: 3 updates in a row (train.max_nonfinite_steps) were not finite"
    assert said.startswith(f"{many}, from step {first} on")
    assert "rows.jsonl" in said and "is finite" in said and "\n" not in said
    run = tmp_path / "run"
    steps = assert_checkpoints_are_finite(run)
    assert f"the newest checkpoint, of step {steps[-1]}," in said and steps[0] == 1
    lines = strictly(run / "metrics.jsonl")
    skipped = [line["step"] for line in lines if line["split"] == "skipped"]
    assert skipped == [*range(first, 5)]
    assert [line["loss"] for line in lines if line["split"] == "train"][-1] is None
    training_summary(run)  # reads a log without a loss


@pytest.mark.pitfall(
    "a NaN is trained on, saved, and the good checkpoints are rotated away",
    seen="training/loop.py: saved whatever they are",
)
def test_parameters_that_overflowed_are_never_saved(tmp_path: Path) -> None:
    """Absurd settings make parameters overflow under finite gradients; the next save finds them."""
    (tmp_path / "target").mkdir()
    path = run_config(tmp_path, write_target(tmp_path / "target"), train={"checkpoint_every": 1})
    words = ["optimizer.learning_rate=1e30", "optimizer.weight_decay=1e30"]
    message = "the parameters are not finite after step 1, .*no checkpoint was written yet"
    with pytest.raises(Diverged, match=message):
        train(load_config(path, words), reporter=quiet())
    assert sound_checkpoint(tmp_path / "run", reporter=quiet()) is None
    strictly(tmp_path / "run" / "metrics.jsonl")


def one_word_answers(path: Path) -> None:
    """Rows into which no block of four fits once they are packed."""
    turns = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]
    path.write_text(24 * (json.dumps({"messages": turns}) + "\n"))


@pytest.mark.parametrize(
    ("reason", "why", "remedy"),
    [
        ("nonfinite", "6 were not finite", "use another copy of the target"),
        ("no_anchor", "6 had no anchor in their batch", "give longer answers"),
    ],
)
def test_a_run_without_any_update_is_no_success(
    tmp_path: Path, reason: str, why: str, remedy: str
) -> None:
    """It is known at the first line of the log, and an earlier start counts too."""
    target, sections = write_target(tmp_path / "target"), {}
    if reason == "nonfinite":
        edit(target, overflow)
    else:
        sections["data"] = {"packing": True}
    path = run_config(tmp_path, target, **sections)
    if reason == "no_anchor":
        one_word_answers(tmp_path / "rows.jsonl")
    heard = Heard()
    with pytest.raises(Interrupted):
        train(load_config(path), reporter=heard, stop_requested=lambda: len(heard.lines) > 3)
    for _ in range(2):  # the second start finds a run that is already trained
        with pytest.raises(Untrained) as raised:
            train(load_config(path), reporter=heard)
        said = str(raised.value)
        assert f"none of 6 steps updated the draft: {why}; {remedy}" in said and "\n" not in said
        assert said.startswith(f"{tmp_path / 'run'}: ") and "hold the initial draft" in said
    assert f"step 2: none of 2 steps updated the draft: {why.replace('6', '2')}; " in heard.text
    assert "step 6: none of 6" not in heard.text  # that is the error
    # The draft is there, as it began.
    assert assert_checkpoints_are_finite(tmp_path / "run")[-1] == 6
    records = read_metrics(tmp_path / "run")
    assert {line.get("reason") for line in records if line["split"] == "skipped"} == {reason}


def test_reasons_without_an_update_are_counted_apart() -> None:
    said = no_update(7, nonfinite=3)
    assert "none of 7 steps updated the draft: 3 were not finite, 4 had no anchor" in said
    assert "dtype=float32; give longer answers" in said


def watch(stored: Any = None, *, max_nonfinite_steps: int = 3) -> StepWatch:
    rows = [Row(np.zeros(1, np.int32), np.ones(1, bool), line=10 + number) for number in range(40)]
    return StepWatch(rows, "a.jsonl", max_nonfinite_steps=max_nonfinite_steps, stored=stored)


def outcome(step: int, sums: tuple[int, int], rows: Any = (), *, loss: float = 0.0) -> StepOutcome:
    names = ("updates", "skipped_nonfinite", "loss_sum", "loss_weight")
    values = map(np.float32, (*sums, loss * 7, 7))
    return StepOutcome(step, list(rows), dict(zip(names, values, strict=True)))


GOOD, BAD, EMPTY = (1, 0), (0, 1), (0, 0)


@pytest.mark.parametrize(
    ("outcomes", "diverged_at"),
    [
        ([BAD, BAD, GOOD, BAD, BAD], None),
        ([GOOD, BAD, BAD, BAD, GOOD], 2),
        ([BAD, EMPTY, BAD, EMPTY, BAD], 1),
        ([EMPTY] * 5, None),
    ],
)
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("restarted", [False, True])
def test_only_steps_in_a_row_count(
    outcomes: list[Any], diverged_at: int | None, window: int, restarted: bool
) -> None:
    """However the steps fall into windows, and when the run is started again after each."""
    steps, told = watch(), []
    numbered = [outcome(step, sums, [step]) for step, sums in enumerate(outcomes, start=1)]
    for first in range(0, len(numbered), window):
        told += steps.notices(numbered[first : first + window])
        if restarted and steps.diverged_at is None:
            steps = watch(json.loads(json.dumps(steps.as_json())))
    skipped = [step for step, x in enumerate(outcomes, 1) if x is not GOOD]
    assert [notice.step for notice in told] == skipped
    assert {notice.record["reason"] for notice in told} <= {"nonfinite", "no_anchor"}
    assert (steps.diverged_at and steps.diverged_at.step) == diverged_at


def test_a_skip_names_its_lines_and_cuts_long_lists() -> None:
    first, second = watch().notices([outcome(1, BAD, [3, 0, 5]), outcome(2, EMPTY, range(20))])
    assert first.record == {"reason": "nonfinite", "lines": [13, 10, 15]}
    assert first.record.keys() == fields_of(first.split) - {"step", "split", "rows"}
    assert first.words.endswith("not finite; lines 13, 10, 15 of a.jsonl")
    assert second.words.startswith("update skipped, no anchor in its batch; lines 10, 11,")
    assert second.words.endswith("and 4 more of a.jsonl")


def test_captured_rows_are_named_by_their_number() -> None:
    rows = [Row(np.zeros(1, np.int32), np.ones(1, bool))] * 3
    (skip,) = StepWatch(rows, "states", max_nonfinite_steps=3).notices([outcome(1, BAD, [2, 0])])
    assert skip.words.endswith("; rows 3, 1 of states") and skip.record["rows"] == [3, 1]


def test_the_message_without_a_checkpoint_promises_none() -> None:
    steps = watch(max_nonfinite_steps=1)
    list(steps.notices([outcome(1, BAD, [2])]))
    assert steps.diverged_at is not None
    said = divergence(Path("run"), steps.diverged_at, max_nonfinite_steps=1, newest_checkpoint=None)
    assert "no checkpoint was written yet" in said and "lines 12 of a.jsonl" in said


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([3.0, 3.1, 9.0, 2.9, 3.0], [3]),
        ([3.0, 3.1, 5.9, 2.9, 3.0], []),
        ([12.9, 11.0, 9.5, 8.0, 7.5], []),  # a beginning is no spike
        ([3.0, 9.0, 3.0, 3.0], []),  # too few for a median
    ],
)
def test_spikes_stand_out_of_the_updates_of_their_window(
    losses: list[float], found: list[int]
) -> None:
    steps = [outcome(step, GOOD, [step], loss=loss) for step, loss in enumerate(losses, 1)]
    skipped = outcome(9, EMPTY, [9], loss=90.0)
    told = watch().notices([*steps, skipped])
    assert [notice.step for notice in told if notice.split == "spike"] == found


def test_a_spike_names_its_size_and_its_lines() -> None:
    steps = [outcome(step, GOOD, [3, 0], loss=loss) for step, loss in enumerate([3.0] * 4 + [9.0])]
    (spike,) = watch().notices(steps)
    assert spike.words == "loss 9.000 is 3.0 times the window's median; lines 13, 10 of a.jsonl"
    assert spike.record == {"loss": 9.0, "median": 3.0, "lines": [13, 10]}
    assert spike.record.keys() == fields_of("spike") - {"step", "split", "rows"}
