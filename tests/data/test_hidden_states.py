"""Captured states on disk: what is written is read, and damage is told in one line."""

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from domino_jax.base.errors import InputError
from domino_jax.data import hidden_states as features
from domino_jax.data.conversations import Row
from domino_jax.data.hidden_states import (
    FeatureRows,
    Manifest,
    check_manifest,
    read_manifest,
    rows_fingerprint,
    shard_path,
    shard_sizes,
    token_spans,
    write_manifest,
    write_shard,
)
from domino_jax.data.pipeline import row_batches

LENGTHS = (5, 3, 7, 1)


def write_capture(directory: Path, *, target_states: bool = True) -> list[Row]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)

    rows = [
        Row(
            rng.integers(0, 9, n).astype(np.int32),
            rng.random(n) < 0.5,
            draw(n, 6),
            draw(n, 3) if target_states else None,
        )
        for n in LENGTHS
    ]
    manifest = Manifest(
        target="a",
        tokenizer="b",
        rows=rows_fingerprint(rows),
        target_layer_ids=(0, 2),
        hidden_size=3,
        dtype="bfloat16",
        compute_dtype="float32",
        max_length=8,
        mask_reasoning_content=False,
        target_states=target_states,
        row_lengths=LENGTHS,
        shard_rows=(3, 1),
        chat_template_kwargs={"enable_thinking": False},
        answer_tokens=9,
        token_spans=token_spans(rows),
    )
    write_manifest(directory, manifest)
    assert read_manifest(directory) == manifest
    write_shard(directory, 0, rows[:3])
    write_shard(directory, 1, rows[3:])
    return rows


@pytest.mark.parametrize("field", ["features", "target_states"])
def test_states_that_are_not_finite_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    rows = write_capture(tmp_path)
    states = getattr(rows[3], field).copy()
    states[0, :2] = np.nan, -np.inf
    shard_path(tmp_path, 1).unlink()
    bad = replace(rows[3], **{field: states}, line=17)
    counted = f"{field}: 2 of {states.size} entries are not finite in bfloat16; "
    with pytest.raises(InputError) as caught:
        write_shard(tmp_path, 1, [bad])
    assert str(caught.value).startswith(
        f"{tmp_path}: line 17 of the conversations was not captured: {counted}"
    )
    assert not shard_path(tmp_path, 1).exists()
    with monkeypatch.context() as unchecked:
        unchecked.setattr(features, "require_finite", lambda *_, **__: None)
        write_shard(tmp_path, 1, [bad])
    assert len(list(zip(range(3), FeatureRows(tmp_path), strict=False))) == 3
    with pytest.raises(InputError) as caught:
        FeatureRows(tmp_path)[3]
    assert str(caught.value).startswith(f"{tmp_path}: row 3: {counted}")


@pytest.mark.parametrize("spans", [[], [3], [4, 4], [4, 2], [-1, 3]])
def test_spans_of_ids_that_are_none_are_refused(tmp_path: Path, spans: list[int]) -> None:
    write_capture(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"token_spans": spans}))
    message = r"manifest\.json: token_spans must be pairs of strictly increasing ids, found \["
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("target_states", [True, False])
def test_rows_come_back_bit_by_bit(tmp_path: Path, target_states: bool) -> None:
    rows = write_capture(tmp_path, target_states=target_states)
    found = FeatureRows(tmp_path)
    assert list(found.lengths) == list(LENGTHS)
    assert found.manifest.token_bytes == (5 + 2 * 9 if target_states else 5 + 2 * 6)
    for ours, theirs in zip(found, rows, strict=True):
        assert ours.arrays.keys() == theirs.arrays.keys()
        for name, values in theirs.arrays.items():
            assert ours.arrays[name].dtype == values.dtype
            np.testing.assert_array_equal(ours.arrays[name], values)


def test_batches_pad_the_states(tmp_path: Path) -> None:
    rows = write_capture(tmp_path)
    packs = [(0, 1), (2,)]
    batch = next(
        row_batches(
            FeatureRows(tmp_path), packs=packs, batch_size=2, max_length=8, seed=0, read_ahead=2
        )
    )
    assert batch["features"].shape == (2, 8, 6) and batch["target_states"].shape == (2, 8, 3)
    assert batch["features"].dtype == ml_dtypes.bfloat16
    slot = int(np.flatnonzero(batch["row_numbers"][:, 0] == 0)[0])
    np.testing.assert_array_equal(batch["features"][slot, 5:8], rows[1].features)
    assert not batch["features"][1 - slot, 7:].any()


def test_shards_hold_whole_rows_in_order() -> None:
    assert shard_sizes([3, 3, 3, 3, 3], shard_bytes=6) == (2, 2, 1)
    assert shard_sizes([9, 1, 1], shard_bytes=2) == (1, 2)
    assert shard_sizes([1], shard_bytes=100) == (1,)


def test_fingerprint_of_rows_sees_ids_masks_and_bounds() -> None:
    def row(ids: list[int], mask: list[bool]) -> Row:
        return Row(np.array(ids, np.int32), np.array(mask))

    sets = [
        [row([1, 2], [True, True])],
        [row([1, 3], [True, True])],
        [row([1, 2], [True, False])],
        [row([1], [True]), row([2], [True])],
    ]
    assert len({rows_fingerprint(rows) for rows in sets}) == 4


OTHERWISE = [
    (
        {"hidden_size": 4},
        r"row 0 has features of shape \(5, 6\) and type bfloat16, .* \(5, 8\) and bfloat16",
    ),
    ({"dtype": "float32"}, r"row 0 has features of .* bfloat16, the manifest says .* float32"),
    (
        {"target_states": False},
        "row 0 has features, .*, target_states, the manifest says features, input_ids, loss_m",
    ),
    ({"row_lengths": [4, 3, 7, 1]}, r"row 0 has input_ids of shape \(5,\) .* says \(4,\)"),
    ({"shard_rows": []}, "shard_rows holds 0 rows, row_lengths 4"),
    ({"shard_rows": [3, 2]}, "shard_rows holds 5 rows, row_lengths 4"),
    ({"shard_rows": [5, -1]}, r"shard_rows must be positive, found \[5, -1\]"),
    ({"row_lengths": []}, "row_lengths is empty"),
    ({"row_lengths": [5, 3, 9, 1]}, "row_lengths must lie in 1..8, found 1 to 9"),
    ({"row_lengths": [5, 3, 0, 1]}, "row_lengths must lie in 1..8, found 0 to 5"),
    ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, found 'float16'"),
    ({"hidden_size": 2**62}, "hidden_size must lie in 1..16777216"),
    ({"max_length": -1}, "max_length must lie in 1..16777216"),
    ({"target_layer_ids": []}, "target_layer_ids must rise from 0 or more"),
    ({"target_layer_ids": [2, 2]}, "target_layer_ids must rise from 0 or more"),
]


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    write_capture(tmp_path)
    shard, manifest = shard_path(tmp_path, 0), (tmp_path / "manifest.json").read_text()
    whole = shard.read_bytes()
    damaged = bytearray(whole)
    damaged[100:300] = bytes(200)
    shard.write_bytes(damaged)
    with pytest.raises(InputError, match=r"row 0 cannot be read|damaged shard"):
        FeatureRows(tmp_path)[0]
    shard.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(InputError, match=r"row 0 cannot be read|damaged shard"):
        FeatureRows(tmp_path)[0]
    shard.write_bytes(shard_path(tmp_path, 1).read_bytes())
    with pytest.raises(InputError, match="2 records, the manifest says 4"):
        FeatureRows(tmp_path)
    shard.write_bytes(whole)
    for tree, message in (
        (manifest.replace("rows", "row", 1), "unknown key 'row'"),
        (manifest.replace("answer_tokens", "rows", 1), "the key 'rows' is given twice"),
        *(
            (json.dumps({**json.loads(manifest), **change}), message)
            for change, message in OTHERWISE
        ),
        ("[]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "manifest.json").write_text(tree)
        with pytest.raises(InputError, match=message):
            FeatureRows(tmp_path)[0]
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path.parent / "elsewhere").write_bytes(whole)
    shard.unlink()
    shard.symlink_to(tmp_path.parent / "elsewhere")
    with pytest.raises(InputError, match=r"shard-00000\.arrayrecord: a link out of its directory"):
        FeatureRows(tmp_path)
    shard.unlink()
    with pytest.raises(InputError, match="unfinished capture, 1 of 2 shards"):
        FeatureRows(tmp_path)


def test_false_and_0_are_two_settings(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manifest = read_manifest(tmp_path)
    told = {"chat_template_kwargs": {"enable_thinking": False}, "target_layer_ids": (0, 2)}
    check_manifest(tmp_path, manifest, told)
    for other, shown in (({"enable_thinking": 0}, '{"enable_thinking": 0}'), ({}, "{}")):
        message = f'is {{"enable_thinking": false}}, asked for is {shown}$'
        with pytest.raises(InputError, match=message):
            check_manifest(tmp_path, manifest, {"chat_template_kwargs": other})
