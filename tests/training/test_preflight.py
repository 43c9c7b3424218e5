"""A run that cannot be is refused before anything is loaded, and leaves nothing behind."""

import importlib.util
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from doubles import slow_after
from tiny import quiet, run_config
from whole_run import train

from domino_jax.base.errors import InputError
from domino_jax.config.run import load_config
from domino_jax.training import preflight, prepare
from domino_jax.training.program import abstract_state


def untimely(*_: Any, **__: Any) -> None:
    raise AssertionError("loaded or read before it was checked")


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads weights or makes a state fails."""
    monkeypatch.setattr(prepare, "load_sharded_target", untimely)
    monkeypatch.setattr(prepare, "state_at_start", untimely)


@pytest.fixture
def reads_nothing(loads_nothing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever encodes rows fails too."""
    monkeypatch.setattr(prepare, "read_rows", untimely)
    monkeypatch.setattr(prepare, "read_features", untimely)


def refusal(path: Path, *overrides: str) -> str:
    """What a start is refused with; everything beside it is as it was."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        train(load_config(path, overrides), reporter=quiet())
    assert sorted(path.parent.rglob("*")) == before
    said = str(caught.value)
    assert "\n" not in said and len(said) <= 500
    return said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train={place}/no", "data.train: {place}/no: not there; expected a JSONL file"),
        ("data.train={place}", "data.train: {place}: not a file; expected a JSONL file"),
        ("data.eval={place}/no", "data.eval: {place}/no: not there; expected a JSONL file"),
        (
            "draft.init_from={place}/no",
            "draft.init_from: {place}/no: not there; expected the directory of a draft",
        ),
        ("draft.init_from={place}", "draft.init_from: {place}: no config.json in it; expected"),
        (
            "data={{hidden_states: {place}, max_length: 24, batch_size: 8}}",
            "data.hidden_states: {place}: no manifest.json in it; expected a directory that",
        ),
        ("target={place}/no", "{place}/no: no such directory, and no built-in target"),
        ("run_dir={place}/rows.jsonl", "run_dir: {place}/rows.jsonl: {place}/rows.jsonl is not a"),
        (
            "run_dir={place}/rows.jsonl/run",
            "run_dir: {place}/rows.jsonl/run: {place}/rows.jsonl is not a directory",
        ),
        ("mesh.fsdp=3", "mesh: mesh data=2 fsdp=3 tensor=1 needs 6 devices, found 8"),
        ("run_dir=gs://bucket/run", "run_dir: gs://bucket/run: an address; expected a directory"),
        (
            "run_dir='a[b]'",
            "a[b]: '[' in the path of a run directory, where no checkpoint could be",
        ),
        (
            'run_dir="a\\\\b*c?d"',
            "'*?\\\\' in the path of a run directory, where no checkpoint could",
        ),
        ("data.batch_size=12", "data.batch_size 12 must be a multiple of 8, the parts"),
        ("seed=-1", "seed must be at least 0 and below 2**32, found -1"),
        ("seed=4294967296", "seed must be at least 0 and below 2**32, found 4294967296"),
        ("draft.mask_token_id=32", "mask_token_id 32 is outside the vocabulary of 32"),
        ("draft.mask_token_id=0", "draft.mask_token_id 0 is the target's eos token"),
        ("draft.target_layer_ids=[0,4]", "target_layer_ids [0, 4] must lie in 0..3"),
        ("loss.loss_type=focal", "loss: loss_type must be one of"),
    ],
)
@pytest.mark.usefixtures("reads_nothing")
def test_what_is_free_to_check_is_checked_first(
    target: Path, tmp_path: Path, override: str, message: str
) -> None:
    found = refusal(run_config(tmp_path, target), override.format(place=tmp_path))
    assert message.format(place=tmp_path) in found


@pytest.mark.usefixtures("reads_nothing")
def test_the_targets_headers_are_read_first(target: Path, tmp_path: Path) -> None:
    spoilt = shutil.copytree(target, tmp_path / "target")
    file = spoilt / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"model.norm.weight"', b'"model.morn.weight"'))
    assert "missing tensor: model.norm.weight; expected" in refusal(run_config(tmp_path, spoilt))


@pytest.mark.usefixtures("loads_nothing")
def test_too_few_rows_are_told_before_the_target_is_loaded(target: Path, tmp_path: Path) -> None:
    path = run_config(tmp_path, target, optimizer={"grad_accumulation": 4})
    assert refusal(path) == (
        f"{tmp_path / 'rows.jsonl'}: 24 rows cannot fill a step of 32 "
        "(data.batch_size 8 x optimizer.grad_accumulation 4)"
    )


@pytest.mark.usefixtures("reads_nothing")
@pytest.mark.parametrize("count", [3, 5, 9])
def test_too_shallow_a_target_is_told_in_the_keys_of_the_run(
    target: Path, tmp_path: Path, count: int
) -> None:
    draft = {"num_hidden_layers": count, "target_layer_ids": None}
    assert refusal(run_config(tmp_path, target, draft=draft)) == (
        f"draft.num_hidden_layers {count} needs {count} different layers of a target of 4 layers; "
        "give draft.target_layer_ids or fewer layers"
    )


@pytest.mark.usefixtures("reads_nothing")
@pytest.mark.parametrize(
    ("module", "override", "requirement"),
    [
        ("grain", "seed=1", "grain"),
        ("tensorboardX", "train.tensorboard=true", "'domino-jax[tensorboard]'"),
        (
            "array_record",
            "data={{train: null, hidden_states: {place}, max_length: 24, batch_size: 8}}",
            "array-record",
        ),
    ],
)
def test_a_missing_package_is_named(
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    override: str,
    requirement: str,
) -> None:
    assert importlib.util.find_spec(module) is not None
    monkeypatch.setitem(sys.modules, module, None)
    found = refusal(run_config(tmp_path, target), override.format(place=tmp_path))
    assert found == f"the package {module} is missing, which this needs: pip install {requirement}"


Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how much is free on every disk."""
    return lambda free: monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda _: Usage(2 * free, free, free)
    )


@pytest.mark.parametrize("ema", slow_after(1, ["0.9", "null"]))
def test_room_for_the_checkpoints_is_checked(
    target: Path, tmp_path: Path, disk: Callable[[int], None], ema: str
) -> None:
    steps = {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 3}
    path = run_config(tmp_path, target, train=steps, draft={"gru_hidden_dim": 512})
    words = (f"optimizer.ema_decay={ema}",)
    checked = prepare.check(load_config(path, words), reporter=quiet(), set_aside=False)
    run = prepare.read_inputs(checked, target_sha256=str, reporter=quiet())
    draft = run.record.config
    state = abstract_state(run.program, draft, run.mesh)
    held = sum(4 * leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert held == preflight.checkpoint_bytes(draft, average=ema != "null")
    needed = 4 * held  # three that are kept, and the one being written
    disk(needed - 1)
    found = refusal(path, *words)
    assert found.startswith(
        f"run_dir: {tmp_path / 'run'}: 4 checkpoints "
        "(train.keep_checkpoints 3 and one being written) take up to "
        f"{needed / 1e9:.3g} GB, {(needed - 1) / 1e9:.3g} GB are free there; "
    )
    disk(needed)
    directory = train(load_config(path, words), reporter=quiet())
    # What is written fits what was reckoned with, and counts as room for the run that goes on.
    files = [file for file in (directory / "checkpoints").rglob("*") if file.is_file()]
    written = sum(file.stat().st_size for file in files)
    # Compressed a little, and small files beside.
    assert 0.8 * 2 * held < written < 2 * held + 2 * 300_000
    disk(needed - written)
    train(load_config(path, words), reporter=quiet())


def test_a_target_that_is_not_finite_leaves_no_run(target: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    spoilt = shutil.copytree(target, tmp_path / "target")
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, spoilt / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight: 1 of 512 entries are not finite" in refusal(
        run_config(tmp_path, spoilt)
    )
