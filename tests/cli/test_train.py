"""`domino capture` and `domino train`, and a target that no verb runs on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file


def test_capture_then_train_offline(domino, trained: Path, tmp_path: Path) -> None:
    config, states = trained / "config.yaml", tmp_path / "states"
    code, out, log = domino("capture", config, states, "--limit-gb", 1e-6)
    assert (code, out) == (2, "") and "above the limit of 1e-06 GB; --yes" in log.splitlines()[-1]
    assert not states.exists()
    code, out, log = domino(
        "capture", config, states, "--limit-gb", 1e-6, "--yes", "data.max_length=20"
    )
    assert (
        (code, out) == (0, f"{states}\n")
        and "tokens of 24 rows, 69 bytes each" in log
        and "shard 1/1" in log
    )
    words = (
        "train",
        config,
        f"run_dir={tmp_path / 'run'}",
        "data.train=null",
        f"data.hidden_states={states}",
    )
    code, out, log = domino(*words)
    assert (code, out) == (2, "") and "max_length is 20, asked for is 24" in log
    assert not (tmp_path / "run").exists()
    code, out, log = domino(*words, "data.max_length=20", "data.packing=true", "data.batch_size=8")
    assert (code, out) == (0, f"{tmp_path / 'run'}\n") and "of their positions are padding" in log


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
    "words",
    [
        (
            "regenerate",
            "{trained}/prompts.jsonl",
            "{new}/answers.jsonl",
            "--target",
            "{trained}/target",
        ),
        (
            "regenerate",
            "{trained}/prompts.jsonl",
            "{new}/a.jsonl",
            "--target",
            "{trained}/target",
            "--dtype",
            "bfloat16",
        ),
        ("capture", "{trained}/config.yaml", "{new}/states"),
        ("train", "{trained}/config.yaml", "run_dir={new}/run"),
        (
            "train",
            "{trained}/config.yaml",
            "run_dir={new}/run",
            "draft.init_layers_from_target=true",
        ),
        ("generate", "{trained}/run", "a b"),
        ("evaluate", "{trained}/run", "{trained}/prompts.jsonl"),
    ],
)
def test_nothing_runs_on_a_target_that_is_not_finite(
    domino, trained: Path, spoilt: str, tmp_path: Path, words: tuple[str, ...]
) -> None:
    code, out, log = domino(*(word.format(trained=trained, new=tmp_path) for word in words))
    last = log.splitlines()[-1]
    assert (code, out) == (2, "") and "Traceback" not in log
    assert (
        last.startswith("error: ")
        and f"tensor {spoilt}: 1 of 512 entries are not finite in " in last
    )
    assert not list(tmp_path.iterdir())


def test_a_run_that_went_astray_has_an_exit_code_of_its_own(
    domino, trained: Path, tmp_path: Path
) -> None:
    run = f"run_dir={tmp_path / 'run'}"
    astray = ("optimizer.learning_rate=1e30", "train.max_nonfinite_steps=1")
    code, out, err = domino("train", trained / "config.yaml", run, *astray)
    last = err.splitlines()[-1]
    assert code == 3 and not out
    assert last.startswith("stopped: ") and len(last) > 100  # one line, however long
