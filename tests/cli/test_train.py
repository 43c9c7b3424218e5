"""`domino capture` and `domino train`, and a target that no verb runs on."""

import importlib
import json
import re
import shlex
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from domino_jax.base import progress


def test_capture_then_train_offline(domino, trained: Path, tmp_path: Path) -> None:
    config, states = trained / "config.yaml", tmp_path / "states"
    capture = ("capture", config, states, "--limit-gb", 1e-6)
    code, out, log = domino(*capture)
    assert (code, out) == (2, "") and "above the limit of 1e-06 GB; --yes" in log.splitlines()[-1]
    assert not states.exists()
    code, out, log = domino(*capture, "--yes", "data.max_length=20")
    assert (code, out) == (0, f"{states}\n")
    assert "tokens of 24 rows, 69 bytes each" in log and "rows 24/24  shard 1 of 1 written, " in log
    run = tmp_path / "run"
    offline = ("data.train=null", f"data.hidden_states={states}", f"run_dir={run}")
    code, out, log = domino("train", config, *offline)
    assert (code, out) == (2, "") and "max_length is 20, asked for is 24" in log
    assert not run.exists()
    packed = ("data.max_length=20", "data.packing=true", "data.batch_size=8")
    code, out, log = domino("train", config, *offline, *packed)
    assert (code, out) == (0, f"{run}\n") and "of their positions are padding" in log


@pytest.fixture
def spoilt(trained: Path) -> Iterator[str]:
    """The name of a tensor of the target that has a NaN for the time of one test."""
    file, name = trained / "target" / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    whole = file.read_bytes()
    tensors = load_file(file)
    tensors[name][3, 5] = np.nan
    save_file(tensors, file)
    yield name
    file.write_bytes(whole)


@pytest.mark.parametrize(
    "line",
    [
        "regenerate prompts.jsonl new/answers.jsonl --target target",
        "regenerate prompts.jsonl new/a.jsonl --target target --dtype bfloat16",
        "capture config.yaml new/states",
        "train config.yaml run_dir=new/run",
        "train config.yaml run_dir=new/run draft.init_layers_from_target=true",
        "generate run 'a b'",
        "evaluate run prompts.jsonl",
    ],
)
def test_nothing_runs_on_a_target_that_is_not_finite(
    domino, trained: Path, spoilt: str, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(trained)
    code, out, log = domino(*shlex.split(line))
    last = log.splitlines()[-1]
    assert (code, out) == (2, "") and "Traceback" not in log
    assert last.startswith("error: ") and f"tensor {spoilt}: 1 of 512 entries are not fin" in last
    assert not (trained / "new").exists()


def test_a_run_that_went_astray_has_an_exit_code_of_its_own(
    domino, trained: Path, tmp_path: Path
) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    astray = ("optimizer.learning_rate=1e30", "train.max_nonfinite_steps=1")
    code, out, err = domino("train", trained / "config.yaml", run, *astray)
    last = err.splitlines()[-1]
    assert code == 3 and not out
    assert last.startswith("stopped: ") and len(last) > 100  # one line, however long


def test_a_run_that_trained_nothing_has_the_same_exit_code(
    domino, trained: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d"}]
    rows.write_text(24 * (json.dumps({"messages": turns}) + "\n"))
    words = (f"run_dir={tmp_path / 'run'}", f"data.train={rows}", "data.packing=true")
    code, out, err = domino("train", trained / "config.yaml", *words, "train.steps=1")
    last = err.splitlines()[-1]
    assert code == 3 and not out
    assert last.startswith(
        f"{tmp_path / 'run'}: none of 1 steps updated the draft: 1 had no anchor"
    )


@pytest.mark.parametrize(
    ("line", "slow", "heard"),
    [
        (
            "capture config.yaml {new}/states",
            "domino_jax.datagen.capture.load_sharded_target",
            r"loading the target .*, float32 \(\d s so far\)",
        ),
        (
            "train config.yaml run_dir={new}/run",
            "domino_jax.training.loop.traced_step",
            r".* \(\d s so far\)",
        ),
        (
            "export run {new}/draft",
            "domino_jax.training.checkpoint.load_draft",
            "loading the draft .*",
        ),
    ],
)
def test_a_log_has_lines_while_a_verb_is_busy(
    domino,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    slow: str,
    heard: str,
) -> None:
    monkeypatch.chdir(trained)
    monkeypatch.setattr(progress, "heartbeat", partial(progress.heartbeat, seconds=0.1))
    module, name = slow.rsplit(".", 1)
    work = getattr(importlib.import_module(module), name)

    def busy(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return work(*arguments, **options)

    monkeypatch.setattr(slow, busy)
    code, out, log = domino(*shlex.split(line.format(new=tmp_path)))
    assert code == 0 and len(out.splitlines()) == 1
    repeated = [one for one in log.splitlines() if one.endswith(" s so far)")]
    assert any(re.fullmatch(heard, one) for one in repeated), log
