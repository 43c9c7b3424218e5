"""Captured states: equal losses without a target, shards that survive a stop, a size told first."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from directories import leftovers
from tiny import CONFIG, Heard, Interrupted, quiet, run_config, write_target
from whole_run import train

from domino_jax.base.errors import InputError
from domino_jax.base.progress import Bar
from domino_jax.config.run import load_config
from domino_jax.data.hidden_states import FeatureRows, shard_path
from domino_jax.datagen import capture as capture_module
from domino_jax.datagen.capture import capture
from domino_jax.formats.safetensors import StoredTensor
from domino_jax.target.decoder import Target
from domino_jax.target.load import load_target
from domino_jax.training.log import read_metrics
from domino_jax.training.prepare import capture_inputs, check, prepare, read_inputs

LAYERS = (0, 2)
WIDTH = CONFIG.hidden_size * len(LAYERS)


def captured(path: Path, directory: Path, *overrides: str, **options: Any) -> list[str]:
    """Runs a capture into many small shards; what it said."""
    said: list[str] = []
    given: dict[str, Any] = dict(dtype="float32", target_states=False, limit_gb=1.0)
    given |= dict(confirmed=False, shard_bytes=12_000, reporter=Heard(lines=said))
    given |= options
    config = load_config(path, overrides)
    read = functools.partial(capture_inputs, config, reporter=given["reporter"])
    capture(read, directory, **given)
    return said


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a run's configuration, and its rows captured as float32 and as bfloat16."""
    directory = tmp_path_factory.mktemp("capture")
    write_target(directory / "target")
    steps = {"steps": 20, "log_every": 1, "eval_every": 20, "checkpoint_every": 20}
    path = run_config(directory, directory / "target", train=steps, data={"max_length": 40})
    (directory / "bfloat16").mkdir()
    unfinished = directory / "bfloat16" / ".manifest.json.1f0c9a7e"
    unfinished.write_text("half of it, as a kill leaves it")
    captured(path, directory / "float32", target_states=True)
    captured(path, directory / "bfloat16", dtype="bfloat16")
    return directory


def losses(place: Path, name: str, *overrides: str) -> np.ndarray:
    """Every figure of a run that does not tell the time: training steps, then the held-out pass."""
    run = place / f"run-{name}"
    train(load_config(place / "config.yaml", [f"run_dir={run}", *overrides]), reporter=quiet())
    names = ("loss", "final_loss", "base_loss", "accept_len", "valid_blocks")
    return np.array([[line[name] for name in names] for line in read_metrics(run) if line["step"]])


def offline(directory: Path) -> tuple[str, str]:
    return "data.train=null", f"data.hidden_states={directory}"


def test_offline_losses_equal_online_ones(place: Path) -> None:
    online = losses(place, "online")
    assert online.shape[0] == 21
    np.testing.assert_allclose(
        losses(place, "float32", *offline(place / "float32")), online, rtol=1e-6
    )
    half = losses(place, "bfloat16", *offline(place / "bfloat16"), "data.eval=null")
    np.testing.assert_allclose(half[:, :3], online[:20, :3], rtol=1e-3)


@pytest.mark.slow
def test_packed_offline_losses_equal_online_ones(place: Path) -> None:
    settings = ("data.packing=true", "data.eval=null", "train.steps=4", "data.max_length=40")
    online = losses(place, "packed-online", *settings)
    np.testing.assert_allclose(
        losses(place, "packed", *settings, *offline(place / "float32")), online, rtol=1e-5
    )


def test_divergence_needs_the_captured_final_states(place: Path, tmp_path: Path) -> None:
    """The last layer is captured and trained on after the final norm."""
    settings = ("loss.kl_weight=0.5", "loss.loss_type=dpace", "train.steps=3", "data.eval=null")
    last = (*settings, "draft.target_layer_ids=[0,3]")
    captured(place / "config.yaml", tmp_path / "states", *last, target_states=True)
    row = FeatureRows(tmp_path / "states")[0]
    np.testing.assert_array_equal(row.features[:, CONFIG.hidden_size :], row.target_states)
    online = losses(place, "kl-online", *last)
    offline_losses = losses(place, "kl", *last, *offline(tmp_path / "states"))
    np.testing.assert_allclose(offline_losses, online, rtol=1e-5)
    message = (
        "captured without the target's final states, which loss.loss_type dpace with "
        "loss.kl_weight 0.5 reads"
    )
    with pytest.raises(InputError, match=message):
        losses(place, "kl-half", *settings, *offline(place / "bfloat16"))


def test_capture_stores_the_states_of_the_target(place: Path) -> None:
    rows, loaded = FeatureRows(place / "float32"), load_target(place / "target")
    online = prepare(
        load_config(place / "config.yaml", [f"run_dir={place / 'x'}"]), reporter=quiet()
    ).inputs.rows.rows
    assert len(rows) == len(online) == 24 and len(rows.manifest.shard_rows) > 3
    model = Target(loaded.config, capture=LAYERS)
    for number in (0, 9, 23):
        row, expected = rows[number], online[number]
        np.testing.assert_array_equal(row.input_ids, expected.input_ids)
        np.testing.assert_array_equal(row.loss_mask, expected.loss_mask)
        output = model.apply({"params": loaded.params}, expected.input_ids[None])
        for found, states in ((row.features, output.features), (row.target_states, output.hidden)):
            assert found is not None and found.dtype == np.float32
            np.testing.assert_allclose(found, states[0], rtol=1e-4, atol=1e-5)
    half = FeatureRows(place / "bfloat16")[3]
    assert half.features.dtype.name == "bfloat16" and half.target_states is None
    assert half.features.shape == (len(half.input_ids), WIDTH)


def test_the_target_runs_over_no_more_padding_than_a_batch_has(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of up to 24 tokens where 128 are allowed: the states are those of rows that fit."""
    lengths = []
    put = capture_module.device_batch

    def heard(mesh: Any, arrays: dict[str, np.ndarray], **options: Any) -> Any:
        lengths.append(arrays["input_ids"].shape[1])
        return put(mesh, arrays, **options)

    monkeypatch.setattr(capture_module, "device_batch", heard)
    captured(place / "config.yaml", tmp_path / "states", "data.max_length=128", target_states=True)
    assert set(lengths) == {capture_module.LENGTH_STEP} and len(lengths) > 3
    wide, narrow = FeatureRows(tmp_path / "states"), FeatureRows(place / "float32")
    for one, other in zip(wide, narrow, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_allclose(one.features, other.features, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.target_states, other.target_states, rtol=1e-4, atol=1e-5)


def test_training_offline_reads_neither_layers_nor_rows_before_they_are_needed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = StoredTensor.read

    def noted(tensor: StoredTensor, part: tuple[slice, ...] = ()) -> np.ndarray:
        read.append(tensor.name)
        return whole(tensor, part)

    monkeypatch.setattr(StoredTensor, "read", noted)
    monkeypatch.setattr(FeatureRows, "__getitem__", None)
    settings = ("data.eval=null", "data.packing=true", f"run_dir={place / 'y'}")
    config = load_config(place / "config.yaml", [*offline(place / "float32"), *settings])
    run = prepare(config, reporter=quiet())
    assert set(run.target_params) == {"embed_tokens", "lm_head"}
    assert set(read) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert run.inputs.rows.packs and run.inputs.rows.epoch_rows < 24


def test_a_capture_cut_off_goes_on_with_the_same_bits(place: Path, tmp_path: Path) -> None:
    path, directory = place / "config.yaml", tmp_path / "states"
    second = f"rows {sum(FeatureRows(place / 'float32').manifest.shard_rows[:2])}/24"
    with pytest.raises(KeyboardInterrupt):
        captured(path, directory, target_states=True, reporter=Interrupted(at=second))
    assert [shard_path(directory, index).exists() for index in range(3)] == [True, True, False]
    (directory / ".shard-00002.arrayrecord.1f0c9a7e").write_bytes(b"half a shard")
    message = r"an unfinished capture, \d+ of \d+ shards are missing \(shard-00002"
    with pytest.raises(InputError, match=message):
        FeatureRows(directory)
    first = shard_path(directory, 0).stat().st_mtime_ns
    # The shards are those it began with.
    said = captured(path, directory, target_states=True, shard_bytes=99)
    _, size, loading, compiling, shard, *_ = said
    assert loading == f"loading the target {place / 'target'}, float32" and compiling == "compiling"
    assert "still to be written" in size and "/24  shard 3 of " in shard
    assert shard_path(directory, 0).stat().st_mtime_ns == first
    assert leftovers(directory) == leftovers(place / "float32")
    for ours, whole in zip(FeatureRows(directory), FeatureRows(place / "float32"), strict=True):
        chex.assert_trees_all_equal(ours.arrays, whole.arrays)
    again = captured(path, directory, target_states=True)
    assert "0 GB of it still to be written" in again[1]
    assert again[2:] == ["every shard is there"]


@pytest.mark.parametrize("damage", [slice(0), slice(99), slice(-1)])
def test_a_damaged_shard_is_written_again(place: Path, tmp_path: Path, damage: slice) -> None:
    directory = shutil.copytree(place / "float32", tmp_path / "states")
    shard = shard_path(directory, 1)
    whole = shard.read_bytes()
    shard.write_bytes(whole[damage])
    said = captured(place / "config.yaml", directory, target_states=True)
    assert said[1].startswith(f"{shard}: a damaged shard: ")
    assert said[1].endswith("; it is written again")
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("source", ["float32/shard-00000", "other/shard-00001"])
def test_a_shard_of_another_place_is_written_again(
    place: Path, tmp_path: Path, source: str
) -> None:
    """Swapped within the capture, or from a capture of another target."""
    directory = shutil.copytree(place / "float32", tmp_path / "states")
    shutil.copytree(place / "float32", tmp_path / "float32")
    if source.startswith("other"):
        other = tmp_path / "target"
        shutil.copytree(place / "target", other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        words = (f"target={other}",)
        captured(place / "config.yaml", tmp_path / "other", *words, target_states=True)
    shard = shard_path(directory, 1)
    whole = shard.read_bytes()
    shutil.copyfile((tmp_path / source).with_suffix(".arrayrecord"), shard)
    with pytest.raises(InputError, match=r"shard-00001\.arrayrecord: (found row 0|states of anot)"):
        losses(place, "misplaced", *offline(directory))
    assert not (place / "run-misplaced").exists()
    said = captured(place / "config.yaml", directory, target_states=True)
    assert said[1].startswith(f"{shard}: ") and said[1].endswith("; it is written again")
    assert shard.read_bytes() == whole


def test_capture_counts_rows_within_a_shard(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a log the heartbeat repeats the count; a shard may take minutes."""
    counts: list[tuple[str, int]] = []

    def noted(bar: Bar, done: int) -> None:
        counts.append((bar.drawn.tasks[0].description, done))

    monkeypatch.setattr(Bar, "update", noted)
    captured(place / "config.yaml", tmp_path / "states", shard_bytes=10**9)
    lines, rows = ([(name, done) for done in range(1, 25)] for name in ("lines", "rows"))
    assert counts == [*lines, ("shards checked", 1), *rows]


@pytest.mark.pitfall(
    "offline states fill the disk",
    seen="datagen/capture.py: the limit not asked; the size not told",
)
def test_the_size_is_told_first_and_limited(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, directory = place / "config.yaml", tmp_path / "new" / "states"
    tokens = sum(FeatureRows(place / "float32").lengths)
    each = 5 + 2 * WIDTH
    said: list[str] = []
    message = "above the limit of 1e-06 GB; --yes writes it all the same, --limit-gb"
    with pytest.raises(InputError, match=message):
        captured(path, directory, dtype="bfloat16", limit_gb=1e-6, reporter=Heard(lines=said))
    total = f"{tokens * each / 1e9:.3g} GB for {tokens} tokens of 24 rows, {each} bytes each"
    assert said[1:] == [f"{directory}: {total}"] and not directory.parent.exists()
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(InputError, match="1e-06 GB free on the disk"):
            captured(path, directory, limit_gb=1e-6, confirmed=True)
    assert not directory.parent.exists()
    captured(path, directory, limit_gb=1e-6, confirmed=True)
    size = sum(shard.stat().st_size for shard in directory.glob("*.arrayrecord"))
    assert size > tokens * (5 + 4 * WIDTH)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ((), {"dtype": "bfloat16"}, "dtype is 'float32', asked for is 'bfloat16'"),
        ((), {"target_states": False}, "target_states is True, asked for is False"),
        (("draft.target_layer_ids=[1]",), {}, r"target_layer_ids is \[0, 2\], asked for is \[1\]"),
        (("data.max_length=41",), {}, "max_length is 40, asked for is 41"),
        (("data.mask_reasoning_content=true",), {}, "mask_reasoning_content is False, asked"),
        (("dtype=bfloat16",), {}, "compute_dtype is 'float32', asked for is 'bfloat16'"),
        (
            ("data.train={place}/heldout.jsonl",),
            {},
            r"rows is sha256 \w+, asked for is sha256 \w+; answer_tokens is 320, asked for is 64$",
        ),
        (("data.train=null", "data.hidden_states=x"), {}, "data.train is missing: capture reads"),
    ],
)
def test_another_capture_is_not_gone_on_with(
    place: Path, overrides: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    words = [word.format(place=place) for word in overrides]
    options = {"target_states": True, **options}
    with pytest.raises(InputError, match=message):
        captured(place / "config.yaml", place / "float32", *words, **options)


def test_capture_leaves_other_directories_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not an empty directory and not one of captured states"):
        captured(place / "config.yaml", tmp_path)


def test_training_refuses_states_of_something_else(place: Path, tmp_path: Path) -> None:
    def refused(message: str, *overrides: str, directory: Path = place / "float32") -> None:
        words = [f"run_dir={tmp_path / 'run'}", *offline(directory), *overrides]
        with pytest.raises(InputError, match=message):
            prepare(load_config(place / "config.yaml", words), reporter=quiet())
        assert not (tmp_path / "run").exists()

    refused(r"target_layer_ids is \[0, 2\], asked for is \[0, 1\]", "draft.target_layer_ids=[0,1]")
    refused("max_length is 40, asked for is 30", "data.max_length=30")
    other = tmp_path / "target"
    shutil.copytree(place / "target", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    otherwise = r"captured otherwise: {} is sha256 \w+, asked for is sha256 \w+$"
    refused(otherwise.format("target"), f"target={other}")
    shutil.copytree(place / "target", other, dirs_exist_ok=True)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    refused(otherwise.format("tokenizer"), f"target={other}")
    refused("expected a directory that `domino capture` wrote", directory=tmp_path)


def test_a_mask_token_that_captured_rows_contain_is_refused(place: Path, tmp_path: Path) -> None:
    """The rows are not read for it: the manifest lists their ids."""
    rows = FeatureRows(place / "float32")
    ids = set(np.concatenate([row.input_ids for row in rows]).tolist())
    assert ids == {token for token in range(99) if rows.manifest.contains(token)}
    for token in range(3, CONFIG.vocab_size):
        words = (f"run_dir={tmp_path / 'run'}", f"draft.mask_token_id={token}", "data.eval=null")
        config = load_config(place / "config.yaml", [*words, *offline(place / "float32")])
        checked = check(config, reporter=quiet(), set_aside=False)
        read = functools.partial(
            read_inputs, checked, target_sha256=lambda: rows.manifest.target, reporter=quiet()
        )
        if token in ids:
            message = f"the captured rows contain draft.mask_token_id {token}; give an id that no"
            with pytest.raises(InputError, match=message):
                read()
        else:
            assert len(read().rows.rows) == 24


def test_rows_come_from_one_place(place: Path) -> None:
    for word, found in (("data.hidden_states=x", "both"), ("data.train=null", "neither")):
        message = f"data: give one of train and hidden_states, found {found}"
        with pytest.raises(InputError, match=message):
            load_config(place / "config.yaml", [word])
