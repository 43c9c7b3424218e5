"""Captured states on disk: what is written is read, and damage is told in one line."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from directories import leftovers
from safetensors.numpy import save

from domino_jax.base.errors import InputError
from domino_jax.base.files import read_own_json, remove_unfinished, write_json
from domino_jax.data import hidden_states as features
from domino_jax.data.conversations import Row
from domino_jax.data.hidden_states import (
    MANIFEST,
    FeatureRows,
    Manifest,
    check_manifest,
    read_manifest,
    rows_fingerprint,
    shard_path,
    shard_problem,
    shard_sizes,
    token_spans,
    write_manifest,
    write_shard,
)
from domino_jax.data.pipeline import row_batches

LENGTHS = (5, 3, 7, 1)
ANOTHER = r"shard-00000\.arrayrecord: states of another capture, expected those of manifest\.json; "


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
    write_shard(directory, 0, rows[:3], manifest=manifest)
    write_shard(directory, 1, rows[3:], manifest=manifest)
    return rows


def change_manifest(directory: Path, **changes: Any) -> None:
    """Writes a manifest with other values and their own hash."""
    path = directory / MANIFEST
    write_json(path, read_own_json(path, remedy="") | changes)


@pytest.mark.parametrize("field", ["features", "target_states"])
def test_states_that_are_not_finite_are_neither_written_nor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    rows = write_capture(tmp_path)
    states = getattr(rows[3], field).copy()
    states[0, :2] = np.nan, -np.inf
    manifest = read_manifest(tmp_path)
    shard_path(tmp_path, 1).unlink()
    bad = replace(rows[3], **{field: states}, line=17)
    counted = f"{field}: 2 of {states.size} entries are not finite in bfloat16; "
    with pytest.raises(InputError) as caught:
        write_shard(tmp_path, 1, [bad], manifest=manifest)
    assert str(caught.value).startswith(
        f"{tmp_path}: line 17 of the conversations was not captured: {counted}"
    )
    assert leftovers(tmp_path) == [MANIFEST, "shard-00000.arrayrecord"]
    with monkeypatch.context() as unchecked:
        unchecked.setattr(features, "require_finite", lambda *_, **__: None)
        write_shard(tmp_path, 1, [bad], manifest=manifest)
    assert len(list(zip(range(3), FeatureRows(tmp_path), strict=False))) == 3
    with pytest.raises(InputError) as caught:
        FeatureRows(tmp_path)[3]
    assert str(caught.value).startswith(f"{tmp_path}: row 3: {counted}")


@pytest.mark.parametrize("spans", [[], [3], [4, 4], [4, 2], [-1, 3]])
def test_spans_of_ids_that_are_none_are_refused(tmp_path: Path, spans: list[int]) -> None:
    write_capture(tmp_path)
    change_manifest(tmp_path, token_spans=spans)
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
    ({"hidden_size": 4}, ANOTHER),
    ({"dtype": "float32"}, ANOTHER),
    ({"target_states": False}, ANOTHER),
    ({"row_lengths": [4, 3, 7, 1]}, ANOTHER),
    ({"shard_rows": [2, 2]}, ANOTHER),
    ({"target": "c"}, ANOTHER),
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
    shard.write_bytes(whole)
    for change, message in (*OTHERWISE, ({"row": 1}, "unknown key 'row'")):
        change_manifest(tmp_path, **change)
        with pytest.raises(InputError, match=message):
            FeatureRows(tmp_path)
        (tmp_path / "manifest.json").write_text(manifest)
    for tree, message in (
        (manifest.replace("answer_tokens", "rows", 1), "the key 'rows' is given twice"),
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


def test_swapped_and_foreign_shards_are_refused_before_the_first_row(tmp_path: Path) -> None:
    """Of the same sizes, so that nothing but their stamps differs."""
    ours, other = tmp_path / "ours", tmp_path / "other"
    for directory in (ours, other):
        directory.mkdir()
    rows = write_capture(ours)[:2]
    rows = [rows[0], replace(rows[0], features=rows[0].features + 1)]
    manifest = replace(read_manifest(ours), row_lengths=(5, 5), shard_rows=(1, 1))
    for directory, one in ((ours, manifest), (other, replace(manifest, target="z"))):
        write_manifest(directory, one)
        for index in range(2):
            write_shard(directory, index, rows[index : index + 1], manifest=one)
    first, second = (shard_path(ours, index).read_bytes() for index in range(2))
    assert [shard_problem(ours, index, manifest) for index in range(2)] == [None, None]
    foreign = shard_path(other, 1).read_bytes()
    remedy = "; `domino capture` with the same words writes it again"
    for index, content, message in (
        (0, second, "found row 1, expected row 0"),
        (1, first, "found row 0, expected row 1"),
        (1, foreign, f"states of another capture, expected those of {MANIFEST}"),
    ):
        shard_path(ours, 0).write_bytes(first)
        shard_path(ours, 1).write_bytes(second)
        shard_path(ours, index).write_bytes(content)
        with pytest.raises(InputError) as caught:
            FeatureRows(ours)
        assert str(caught.value) == f"{shard_path(ours, index)}: {message}{remedy}"
        assert shard_problem(ours, index, manifest) == message


def test_records_at_another_place_are_refused(tmp_path: Path) -> None:
    """Within a shard whose header is right, as no verb writes it."""
    write_capture(tmp_path)
    manifest, shard = read_manifest(tmp_path), shard_path(tmp_path, 0)
    with ArrayRecordDataSource([str(shard)]) as records:
        header, *rows = list(records)

    def write(*found: bytes) -> None:
        writer = ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
        for record in found:
            writer.write(record)
        writer.close()

    write(header, rows[0], rows[2], rows[1])
    message = "row 1: found row 2, expected row 1; `domino capture` with the same words writes it"
    with pytest.raises(InputError, match=message):
        FeatureRows(tmp_path)[1]
    assert shard_problem(tmp_path, 0, manifest) == "found row 2, expected row 1"
    for found in (rows[:2], [*rows, rows[2]]):
        write(header, *found)
        message = f"{len(found)} rows, expected 3"
        with pytest.raises(InputError, match=rf"00000\.arrayrecord: {message}; "):
            FeatureRows(tmp_path)
        assert shard_problem(tmp_path, 0, manifest) == message
    identity = np.frombuffer(bytes.fromhex(manifest.identity), np.uint8)
    write(save({"capture": identity, "row": np.zeros(0, np.int64)}), *rows)
    assert shard_problem(tmp_path, 0, manifest) == "found row none, expected row 0"


def test_every_changed_digit_of_a_manifest_is_refused(tmp_path: Path) -> None:
    write_capture(tmp_path)
    path = tmp_path / MANIFEST
    text = path.read_text()
    digits = [at for at, letter in enumerate(text) if letter.isdigit()]
    assert len(digits) > 50
    for at in digits:
        path.write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}")
        with pytest.raises(InputError, match=r"manifest\.json: .*"):
            read_manifest(tmp_path)
    earlier = json.loads(text)
    del earlier["sha256"]
    path.write_text(json.dumps(earlier))
    message = "no key 'sha256', .*; capture the states again, into a new directory$"
    with pytest.raises(InputError, match=message):
        read_manifest(tmp_path)


def test_no_changed_byte_of_a_shard_gives_other_values(tmp_path: Path) -> None:
    """Every byte that is not padding, and some of the padding, one at a time."""
    row, shard = write_capture(tmp_path)[3], shard_path(tmp_path, 1)
    manifest, whole = read_manifest(tmp_path), shard.read_bytes()
    content = [at for at, byte in enumerate(whole) if byte]
    padding = range(0, len(whole), 2503)
    found = []
    with shard.open("r+b", buffering=0) as file:
        for at in sorted({*content, *padding}):
            file.seek(at)
            file.write(bytes([whole[at] ^ (1 << at % 8)]))
            found.append(shard_problem(tmp_path, 1, manifest))
            if found[-1] is None:
                arrays = FeatureRows(tmp_path)[3].arrays
                for name, values in row.arrays.items():
                    np.testing.assert_array_equal(arrays[name], values)
            file.seek(at)
            file.write(whole[at : at + 1])
    assert len(content) > 500 and found.count(None) < len(found) / 4


def test_a_shard_follows_no_planted_link(tmp_path: Path) -> None:
    rows, manifest = write_capture(tmp_path), read_manifest(tmp_path)
    other = tmp_path / "other"
    other.write_text("mine")
    for name in ("shard-00000.partial", "shard-00000.arrayrecord.new"):
        (tmp_path / name).symlink_to(other)
    write_shard(tmp_path, 0, rows[:3], manifest=manifest)
    assert other.read_text() == "mine" and shard_problem(tmp_path, 0, manifest) is None


def test_an_interrupted_shard_is_removed(tmp_path: Path) -> None:
    rows, manifest = write_capture(tmp_path), read_manifest(tmp_path)
    before = leftovers(tmp_path)

    def half() -> Iterator[Row]:
        yield rows[0]
        assert len(leftovers(tmp_path)) == len(before) + 1
        remove_unfinished()  # as a signal does
        assert leftovers(tmp_path) == before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, 0, half(), manifest=manifest)
    assert leftovers(tmp_path) == before and shard_problem(tmp_path, 0, manifest) is None


def test_false_and_0_are_two_settings(tmp_path: Path) -> None:
    write_capture(tmp_path)
    manifest = read_manifest(tmp_path)
    told = {"chat_template_kwargs": {"enable_thinking": False}, "target_layer_ids": (0, 2)}
    check_manifest(tmp_path, manifest, told)
    for other, shown in (({"enable_thinking": 0}, '{"enable_thinking": 0}'), ({}, "{}")):
        message = f'is {{"enable_thinking": false}}, asked for is {shown}$'
        with pytest.raises(InputError, match=message):
            check_manifest(tmp_path, manifest, {"chat_template_kwargs": other})
