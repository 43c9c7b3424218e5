"""Files of tensors: opened by their headers, read in parts, and everything else one clear line."""

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from domino_jax.base.errors import InputError
from domino_jax.formats.safetensors import (
    StoredTensor,
    check_tensors,
    equal_tensors,
    open_safetensors,
    write_safetensors,
)

PARTS = [(), (slice(1, 3),), (slice(0, 4), slice(2, 5)), (slice(3, 4), slice(0, 1))]


def stored(directory: Path, **tensors: np.ndarray) -> dict[str, StoredTensor]:
    save_file(tensors, directory / "model.safetensors")
    return open_safetensors(directory)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("part", PARTS)
def test_open_safetensors_reads_a_part(tmp_path: Path, dtype: str, part: tuple[slice, ...]) -> None:
    numbers = np.random.default_rng(0).standard_normal((4, 6))
    values = numbers.astype(ml_dtypes.bfloat16).astype(dtype)
    tensor = stored(tmp_path, a=values, b=np.ones(3, np.float32))["a"]
    found = tensor.read(part)
    assert tensor.shape == (4, 6) and found.dtype == values.dtype
    np.testing.assert_array_equal(found, values[part])


def test_open_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    matrix = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    tensors = {"a": matrix, "scalar": np.array(3, np.float16)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    found = {name: tensor.read() for name, tensor in open_safetensors(tmp_path).items()}
    assert set(found) == set(tensors)
    for name, values in tensors.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    ("stored_type", "name"),
    [("I64", "int64"), ("U8", "uint8"), ("F64", "float64"), ("BOOL", "bool"), ("F8_E4M3",) * 2],
)
def test_open_safetensors_refuses_a_type(tmp_path: Path, stored_type: str, name: str) -> None:
    size = {"I64": 8, "F64": 8}.get(stored_type, 1)
    tensor = {"dtype": stored_type, "shape": [1], "data_offsets": [0, size]}
    header = json.dumps({"a": tensor}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(size)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError) as caught:
        open_safetensors(tmp_path)
    place, supported = tmp_path / "model.safetensors", "supported: float32, float16, bfloat16"
    assert str(caught.value) == f"{place}: tensor a is {name}; {supported}"


def test_open_safetensors_refuses_a_file_that_was_cut_off(tmp_path: Path) -> None:
    stored(tmp_path, a=np.ones((8, 8), np.float32))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        open_safetensors(tmp_path)


def test_check_tensors_names_what_differs(tmp_path: Path) -> None:
    tensors = stored(tmp_path, a=np.ones((2, 3), np.float32))
    check_tensors(tensors, {"a": (2, 3)}, source=tmp_path)
    for shapes, message in (
        ({"a": (2, 3), "b": (1,)}, "missing tensor: b; expected 2, found 1"),
        ({}, "unexpected tensor: a; expected 0, found 1"),
        ({"a": (3, 2)}, r"tensor a has shape \[2, 3\], expected \[3, 2\]"),
    ):
        with pytest.raises(InputError, match=f"{tmp_path}: {message}"):
            check_tensors(tensors, shapes, source=tmp_path)


@pytest.mark.parametrize("chunk_bytes", [1, 80, 2**20])
def test_equal_tensors_sees_the_last_number(tmp_path: Path, chunk_bytes: int) -> None:
    values = np.arange(35, dtype=np.float32).reshape(7, 5)
    other = values.copy()
    other[-1, -1] += 1
    same = values.astype(np.float16)
    tensors = stored(tmp_path, a=values, same=same, other=other, fewer=values[:6])
    assert equal_tensors(tensors["a"], tensors["same"], chunk_bytes=chunk_bytes)
    assert not equal_tensors(tensors["a"], tensors["other"], chunk_bytes=chunk_bytes)
    assert not equal_tensors(tensors["a"], tensors["fewer"], chunk_bytes=chunk_bytes)


def test_open_safetensors_never_opens_a_pickle(tmp_path: Path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> Any:
            return opened.write_text, ("",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    message = r"found the pickle pytorch_model\.bin, which is never opened"
    with pytest.raises(InputError, match=message):
        open_safetensors(tmp_path)
    assert not opened.exists()


def test_open_safetensors_names_what_it_cannot_read(tmp_path: Path) -> None:
    message = r"expected model\.safetensors or model\.safetensors\.index\.json; not there"
    with pytest.raises(InputError, match=message):
        open_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor file at all")
    with pytest.raises(InputError, match=r"model.safetensors: not a readable safetensors file"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors"}, "two.safetensors: No such file"),
        (
            {"a": "one.safetensors", "b": "one.safetensors"},
            "one.safetensors: holds other tensors than",
        ),
        (
            {"a": "../one.safetensors"},
            "weight_map names '../one.safetensors'; expected a file of the same directory",
        ),
        ({"a": 3}, "expected weight_map, a mapping of tensors to files"),
        (None, "expected weight_map, a mapping of tensors to files"),
    ],
)
def test_open_safetensors_checks_the_index(tmp_path: Path, places: Any, message: str) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError) as caught:
        open_safetensors(tmp_path)
    assert message in str(caught.value)


FULL = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
LIES = {
    "a tensor twice": b'{"a": %(full)s, "a": %(half)s}',
    "an overlap": {"a": FULL, "b": FULL},
    "a hole": {
        "a": {**FULL, "shape": [1], "data_offsets": [0, 4]},
        "b": {**FULL, "shape": [2], "data_offsets": [8, 16]},
    },
    "too few": {"a": {**FULL, "shape": [2], "data_offsets": [0, 8]}},
    "too many": {"a": {**FULL, "shape": [400], "data_offsets": [0, 1600]}},
    "another size": {"a": {**FULL, "shape": [3]}},
    "a reversed range": {"a": {**FULL, "data_offsets": [16, 0]}},
    "beyond every file": {"a": {**FULL, "shape": [2**62], "data_offsets": [0, 2**64 - 1]}},
    "an overflow": {"a": {**FULL, "shape": [2**33, 2**33]}},
    "a negative size": {"a": {**FULL, "shape": [-4]}},
    "depth": b'{"__metadata__": ' + b'{"a": ' * 5000,
    "nothing": {},
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES.keys())
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any) -> None:
    if isinstance(header, bytes):
        half = json.dumps({**FULL, "shape": [2, 2]}).encode()
        raw = header.replace(b"%(full)s", json.dumps(FULL).encode()).replace(b"%(half)s", half)
    else:
        raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    message = r"not a readable safetensors file|header: not valid JSON: the key 'a' is given"
    with pytest.raises(InputError, match=message):
        open_safetensors(tmp_path)
    for size in (0, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", size) + raw)
        with pytest.raises(InputError, match="not a readable safetensors file"):
            open_safetensors(tmp_path)


def test_a_shard_that_leads_out_of_the_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    stored(tmp_path, a=np.ones(2, np.float32))
    (tmp_path / "model" / "one.safetensors").symlink_to(tmp_path / "model.safetensors")
    index = {"weight_map": {"a": "one.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"one\.safetensors: a link out of its directory"):
        open_safetensors(tmp_path / "model")
