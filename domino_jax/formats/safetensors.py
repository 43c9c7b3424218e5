"""Safetensors files of a Hugging Face directory, read strictly or refused, never pickles.

The weights of a target may be larger than one device, or than the host, can hold. So opening a
directory reads the headers of its files alone, which is enough to refuse a wrong one, and every
tensor is then read in the parts that somebody has room for:

    model-00001-of-00002.safetensors | header: name, type, shape | values ...
                                       open_safetensors            StoredTensor.read(part)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from domino_jax.base.errors import InputError, require, shown, text_problem
from domino_jax.base.files import TEXT_BYTES, checked_file, open_regular, read_json, write_error
from domino_jax.base.finite import count_non_finite, not_finite
from domino_jax.base.parse import parse_json

CHUNK_BYTES = 2**26  # of a tensor that is read a few rows at a time
ANOTHER_COPY = "use an undamaged copy of the file"
_FLOAT_TYPES = ("float32", "float16", "bfloat16")
_KINDS = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}
_UNREADABLE = (SafetensorError, TypeError, ValueError, AttributeError)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file: what the header says of it, and its values when they are asked for."""

    file: Path
    name: str
    shape: tuple[int, ...]
    _values: Any = field(repr=False)  # safetensors' view of the mapped file, which it keeps open

    def read(self, part: tuple[slice, ...] = ()) -> np.ndarray:
        """Reads the tensor, or a part of it without the rest.

        Args:
            part: a slice for each of the first axes; the other axes are whole.
        Returns:
            An array of its own memory, in the file's type.
        Raises:
            InputError: a type that numpy does not have.
        """
        try:
            return self._values[part]
        except _UNREADABLE as error:
            raise _unreadable(self.file, error) from error


def open_safetensors(directory: str | Path) -> dict[str, StoredTensor]:
    """Opens the safetensors of a Hugging Face directory, one file or shards, and reads no tensor.

    Args:
        directory: holds model.safetensors, or model.safetensors.index.json and its shards.
    Returns:
        The tensors by their names in the files.
    Raises:
        InputError: no such file, a damaged file, a pickle, a type that is not floating point, an
            index that disagrees with its shards, or a link out of the model, see `checked_file`.
    """
    directory = Path(directory)
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    # One file is taken before an index, as by transformers.
    if single.exists():
        return _open_file(checked_file(directory, single.name))
    if not index.exists():
        patterns = ("*.bin", "*.pt", "*.pth")
        pickles = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
        found = "not there"
        if pickles:
            found = f"found the pickle {pickles[0]}, which is never opened: save it as safetensors"
        raise InputError(f"{directory}: expected {single.name} or {index.name}; {found}")
    places = read_json(checked_file(directory, index.name)).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index}: expected weight_map, a mapping of tensors to files")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard or text_problem(shard):
            expected = "expected a file of the same directory"
            raise InputError(f"{index}: weight_map names {shown(shard)}; {expected}")
        held = _open_file(checked_file(directory, shard))
        # Both ways: a tensor that the index leaves out would be dropped unseen.
        differing = set(held) ^ {name for name, file in places.items() if file == shard}
        if differing:
            raise InputError(
                f"{directory / shard}: holds other tensors than {index.name} says: "
                f"{_some(differing)}"
            )
        tensors |= held
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes tensors as one file whose mode follows the umask, as that of any other new file.

    Args:
        path: of a file that is not there yet.
        tensors: contiguous arrays by name.
    Raises:
        OSError: it could not be written.
    """
    # The library leaves a file of mode 600, which nobody else could serve.
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise write_error(error, path) from error
    path.chmod(mode)


def check_tensors(
    tensors: Mapping[str, np.ndarray | StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    source: Path,
) -> None:
    """Refuses tensors that are not exactly the expected ones.

    Args:
        tensors: what was found, by name.
        shapes: what was expected, by name.
        source: file or directory for the message.
    Raises:
        InputError: names with another prefix, or missing, unexpected or mis-shaped tensors, by
            name, found and expected.
    """
    counts = f"expected {len(shapes)}, found {len(tensors)}"
    missing = set(shapes) - set(tensors)
    unexpected = set(tensors) - set(shapes)
    # Most names: one that differs is another tensor, not another prefix.
    renamed = _other_prefix(missing, unexpected) if 2 * len(missing) > len(shapes) else None
    if renamed:
        raise InputError(f"{source}: {renamed}")
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise InputError(f"{source}: {word} tensor: {_some(names)}; {counts}")
    for name, shape in shapes.items():
        found = list(tensors[name].shape)
        expected = list(shape)
        if found != expected:
            raise InputError(f"{source}: tensor {name} has shape {found}, expected {expected}")


def equal_tensors(
    one: StoredTensor, other: StoredTensor, *, chunk_bytes: int = CHUNK_BYTES
) -> bool:
    """Whether two tensors hold the same numbers, or NaN in the same places.

    Args:
        one: of any shape with rows; read a few rows at a time.
        other: likewise.
        chunk_bytes: of either that the host holds, at least a row.
    """
    if one.shape != other.shape:
        return False
    for rows in _chunks(one.shape, chunk_bytes):
        if not np.array_equal(one.read(rows), other.read(rows), equal_nan=True):
            return False
    return True


def not_finite_tensor(tensor: StoredTensor, *, dtype: str) -> InputError:
    """The error that says how much of a stored tensor is not finite, or too large for `dtype`.

    Args:
        tensor: of any shape with rows; read again, a few rows at a time.
        dtype: of the computation.
    """
    count = 0
    for rows in _chunks(tensor.shape, CHUNK_BYTES):
        # Counted after the cast, where numbers too large for `dtype` are infinite; numpy would
        # warn of what the error says.
        with np.errstate(over="ignore", invalid="ignore"):
            count += count_non_finite(tensor.read(rows).astype(dtype))
    source, size = f"{tensor.file}: tensor {tensor.name}", math.prod(tensor.shape)
    return not_finite(source, count, of=size, dtype=dtype, remedy=ANOTHER_COPY)


def _chunks(shape: tuple[int, ...], chunk_bytes: int) -> Iterator[tuple[slice]]:
    # As float32, the widest type that is read; a row of no numbers would divide by zero.
    row_bytes = 4 * max(math.prod(shape[1:]), 1)
    step = max(chunk_bytes // row_bytes, 1)
    for start in range(0, shape[0], step):
        yield (slice(start, min(start + step, shape[0])),)


def _open_file(path: Path) -> dict[str, StoredTensor]:
    tensors = {}
    _check_header(path)
    try:
        # The views stay readable after the `with`: each keeps the mapping of the file.
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                values = file.get_slice(name)
                _check_type(path, name, values.get_dtype())
                tensors[name] = StoredTensor(path, name, tuple(values.get_shape()), values)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except InputError:  # a ValueError, which `_UNREADABLE` has too
        raise
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return tensors


def _check_header(path: Path) -> None:
    """Refuses a header that describes a tensor twice, or that takes much memory to parse.

    The library takes the last of two descriptions. Whatever else does not add up it refuses.
    """
    with open_regular(path) as file:
        size = int.from_bytes(file.read(8), "little")
        source = f"{path}: not a readable safetensors file: header"
        require(size <= TEXT_BYTES, f"{source}: {size} bytes, expected at most {TEXT_BYTES}")
        parse_json(file.read(size).rstrip(b"\0"), source=source)


def _check_type(path: Path, name: str, stored: str) -> None:
    """Refuses a type such as "I8"; rotary buffers, which nobody reads, may have any."""
    kind = stored.rstrip("0123456789")
    dtype = _KINDS.get(kind, kind) + stored[len(kind) :]
    if dtype not in _FLOAT_TYPES and not name.endswith("rotary_emb.inv_freq"):
        raise InputError(f"{path}: tensor {name} is {dtype}; supported: {', '.join(_FLOAT_TYPES)}")


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: not a readable safetensors file: {error}")


def _other_prefix(missing: set[str], unexpected: set[str]) -> str | None:
    """What is wrong with names that all have another prefix than expected, None of any others."""
    wanted = min(missing)
    parts = wanted.split(".")
    # The longest common end first: `model.model.norm` ends with the whole of `model.norm`.
    for first in range(len(parts)):
        tail = ".".join(parts[first:])
        prefix = wanted.removesuffix(tail)
        for name in sorted(unexpected):
            found = name.removesuffix(tail)
            if name != f"{found}{tail}" or (found and not found.endswith(".")):
                continue
            if all(f"{found}{other.removeprefix(prefix)}" in unexpected for other in missing):
                words = f"begin with {found!r}, expected {prefix!r}"
                if not found:
                    words = f"lack the prefix {prefix!r}"
                elif not prefix:
                    words = f"have the prefix {found!r}, which was not expected"
                return (
                    f"tensor names {words}: for example {name} in the place of {wanted}; rename "
                    "the tensors"
                )
    return None


def _some(names: set[str]) -> str:
    """The first three names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(ordered[:3]) + more
