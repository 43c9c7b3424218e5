"""Captured states of the target on disk: ArrayRecord shards of rows, and a manifest.

Runs over the same rows would repeat the target's forward, which is most of a step. Written once,
its states are read row by row as training needs them. The manifest describes them, so that states
of another target, template or layer are refused and not trained on:

    manifest.json             written first: target, rows, layers, rows of each shard; its own hash
    shard-00000.arrayrecord   a header, then rows 0 .. shard_rows[0] - 1, a record each
    shard-00001.arrayrecord   a header, then the next shard_rows[1] rows

A record is a safetensors. Each one has a stamp: the manifest's identity and a row number (a
header has that of its shard's first row). ArrayRecord verifies the bytes of each record, and the
stamp their place, so a row costs nothing more to read, and a capture opens after one small record
of each shard. A hash of whole shards would read hundreds of gigabytes before the first step.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from domino_jax.base.errors import InputError, Scalars, from_dict, require, shown
from domino_jax.base.files import (
    MANY_ENTRIES,
    checked_file,
    read_own_json,
    whole_path,
    write_error,
    write_json,
)
from domino_jax.base.finite import require_finite
from domino_jax.config.sizes import SIZE_LIMIT
from domino_jax.data.conversations import Row
from domino_jax.data.template import settings_text

MANIFEST = "manifest.json"
_CAPTURE_AGAIN = "capture the states again, into a new directory"
_WRITE_AGAIN = "`domino capture` with the same words writes it again"
# A row's number and the capture that it belongs to, in every record.
_STAMP = ("capture", "row")
# By the names of safetensors, and no more of them than a capture may hold.
_TYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "I32": np.int32,
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I64": np.int64,
}
_BYTES = {"float32": 4, "bfloat16": 2}
# Raised for a record that cannot be read, or that is no safetensors of ours.
_UNREADABLE = (RuntimeError, SafetensorError, KeyError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a directory of captured states holds.

    `target`, `tokenizer` and `rows` are sha256 sums (see `target.fingerprint` and
    `rows_fingerprint`), `hidden_size` is D, `dtype` the stored type, `compute_dtype` the one the
    target ran in, `target_states` whether its states after the final norm are there too.
    `row_lengths` are tokens per row, `shard_rows` rows per shard, `chat_template_kwargs` the
    template's arguments, `answer_tokens` how many tokens of all rows the target generated,
    `token_spans` which token ids the rows contain, see `token_spans`.
    """

    target: str
    tokenizer: str
    rows: str
    target_layer_ids: tuple[int, ...]
    hidden_size: int
    dtype: str
    compute_dtype: str
    max_length: int
    mask_reasoning_content: bool
    target_states: bool
    row_lengths: tuple[int, ...]
    shard_rows: tuple[int, ...]
    chat_template_kwargs: Scalars
    answer_tokens: int
    token_spans: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuses what no capture can hold; `shard_rows` may be empty until it is planned."""
        for name in ("dtype", "compute_dtype"):
            found = getattr(self, name)
            require(
                found in _BYTES, f"{name} must be one of {', '.join(_BYTES)}, found {shown(found)}"
            )
        for name in ("hidden_size", "max_length"):
            found = getattr(self, name)
            require(1 <= found <= SIZE_LIMIT, f"{name} must lie in 1..{SIZE_LIMIT}, found {found}")
        layers = list(self.target_layer_ids)
        rising = bool(layers) and layers == sorted(set(layers))
        inside = rising and layers[0] >= 0 and layers[-1] < SIZE_LIMIT
        require(inside, f"target_layer_ids must rise from 0 or more, found {shown(layers)}")
        require(bool(self.row_lengths), "row_lengths is empty")
        shortest, longest = min(self.row_lengths), max(self.row_lengths)
        require(
            shortest >= 1 and longest <= self.max_length,
            f"row_lengths must lie in 1..{self.max_length}, found {shortest} to {longest}",
        )
        require(
            min(self.shard_rows, default=1) >= 1,
            f"shard_rows must be positive, found {shown(list(self.shard_rows))}",
        )
        spans = list(self.token_spans)
        require(
            bool(spans) and len(spans) % 2 == 0 and spans == sorted(set(spans)) and spans[0] >= 0,
            f"token_spans must be pairs of strictly increasing ids, found {shown(spans)}",
        )

    @functools.cached_property
    def identity(self) -> str:
        """sha256, in hex, of all fields: of what was captured, how, and into which shards."""
        return hashlib.sha256(settings_text(dataclasses.asdict(self)).encode()).hexdigest()

    @property
    def first_rows(self) -> list[int]:
        """Number of each shard's first row."""
        return [0, *itertools.accumulate(self.shard_rows[:-1])]

    @property
    def token_bytes(self) -> int:
        """What one token takes on disk."""
        values = self.hidden_size * (len(self.target_layer_ids) + int(self.target_states))
        return 4 + 1 + values * _BYTES[self.dtype]  # its id and its mask

    def contains(self, token: int) -> bool:
        """Whether a token id occurs in the rows."""
        return bisect.bisect_right(self.token_spans, token) % 2 == 1


class FeatureRows(Sequence[Row]):
    """Rows of a finished capture, each read from disk when it is asked for.

    Attributes:
        manifest: what they are.
        lengths: tokens per row.
    """

    def __init__(self, directory: str | Path) -> None:
        """Opens a directory that `domino capture` wrote.

        Raises:
            InputError: no capture, an unfinished one, a file that cannot be read, a shard that is
                a link out of the directory, or one of another capture or another place in it.
        """
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._directory = Path(directory)
        self.manifest = read_manifest(directory)
        self.lengths = self.manifest.row_lengths
        shards = [shard_path(directory, index) for index in range(len(self.manifest.shard_rows))]
        missing = [path.name for path in shards if not path.is_file()]
        if missing:
            raise InputError(
                f"{directory}: an unfinished capture, {len(missing)} of {len(shards)} shards are "
                f"missing ({missing[0]}); `domino capture` with the same words resumes"
            )
        for path in shards:
            checked_file(self._directory, path.name)
        for index, path in enumerate(shards):
            problem = _header_problem(path, self.manifest, index)
            if problem:
                raise InputError(f"{path}: {problem}; {_WRITE_AGAIN}")
        self._first_rows = self.manifest.first_rows
        self._records = ArrayRecordDataSource([str(path) for path in shards])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the manifest: of what was captured, and how."""
        return self.manifest.identity

    # One row at a time, never a slice.
    def __getitem__(self, number: int) -> Row:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)  # ends an iteration
        # Behind the headers of its shard and of those before it.
        position = number + bisect.bisect_right(self._first_rows, number)
        try:
            arrays = _arrays(self._records[position])
            problem = _stamp_problem(arrays, self.manifest, number)
            if problem:
                raise InputError(f"{self._directory}: row {number}: {problem}; {_WRITE_AGAIN}")
            row = Row(**arrays)
            self._check_row(number, row)
        except InputError:  # a ValueError as well, which says already what is wrong
            raise
        except _UNREADABLE as error:
            raise InputError(f"{self._directory}: row {number} cannot be read: {error}") from error
        return row

    def _check_row(self, number: int, row: Row) -> None:
        """Refuses arrays that are not what the manifest says of each row."""
        manifest = self.manifest
        length = self.lengths[number]
        width = manifest.hidden_size
        expected: dict[str, tuple[Any, tuple[int, ...]]] = {
            "input_ids": (np.int32, (length,)),
            "loss_mask": (np.bool_, (length,)),
            "features": (manifest.dtype, (length, width * len(manifest.target_layer_ids))),
        }
        if manifest.target_states:
            expected["target_states"] = (manifest.dtype, (length, width))
        arrays = row.arrays
        if set(arrays) != set(expected):
            raise InputError(
                f"{self._directory}: row {number} has {', '.join(sorted(arrays))}, "
                f"the manifest says {', '.join(sorted(expected))}"
            )
        for name, (dtype, shape) in expected.items():
            found = arrays[name]
            if found.shape != shape or found.dtype != dtype:
                raise InputError(
                    f"{self._directory}: row {number} has {name} of shape {found.shape} and type "
                    f"{found.dtype}, the manifest says {shape} and {np.dtype(dtype)}"
                )
        _require_finite(
            row, source=f"{self._directory}: row {number}", remedy="capture the rows again"
        )


def shard_path(directory: str | Path, index: int) -> Path:
    """Where shard `index`, counted from 0, lies."""
    return Path(directory) / f"shard-{index:05d}.arrayrecord"


def shard_problem(directory: str | Path, index: int, manifest: Manifest) -> str | None:
    """What is wrong with shard `index`, in a few words; None where it is whole.

    Every record is read, which verifies its bytes and its stamp.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    path = shard_path(directory, index)
    if not path.is_file():
        return "missing"
    problem = _header_problem(path, manifest, index)
    if problem:
        return problem
    first, count = manifest.first_rows[index], manifest.shard_rows[index]
    try:
        with ArrayRecordDataSource([str(path)]) as records:
            for position in range(count):
                arrays = _arrays(records[1 + position])
                problem = _stamp_problem(arrays, manifest, first + position)
                if problem:
                    return problem
    except _UNREADABLE as error:
        return f"a damaged shard: {error}"
    return None


def shard_sizes(row_bytes: Sequence[int], *, shard_bytes: int) -> tuple[int, ...]:
    """Rows per shard, in their order; each but the last takes `shard_bytes` or just above."""
    sizes = []
    held = count = 0
    for size in row_bytes:
        held += size
        count += 1
        if held >= shard_bytes:
            sizes.append(count)
            held = count = 0
    return tuple([*sizes, count] if count else sizes)


def write_shard(
    directory: str | Path, index: int, rows: Iterable[Row], *, manifest: Manifest
) -> None:
    """Writes rows as one shard, beside its place first: a shard that is there is whole.

    Args:
        directory: of the capture.
        index: of the shard, from 0.
        rows: of the shard, in their order.
        manifest: of the capture.
    Raises:
        InputError: states of a row that are not finite; no shard is there then.
        OSError: it could not be written; likewise.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path, first = shard_path(directory, index), manifest.first_rows[index]
    with whole_path(path) as beside:
        with _write_errors(path):
            # For random access; floats hardly compress.
            writer = ArrayRecordWriter(str(beside), "group_size:1,uncompressed")
        try:
            with _write_errors(path):
                writer.write(save(_stamp(manifest, first)))
            for number, row in enumerate(rows, start=first):
                source = f"{directory}: line {row.line} of the conversations was not captured"
                _require_finite(
                    row, source=source, remedy="leave the line out, or capture in float32"
                )
                arrays = {name: np.ascontiguousarray(x) for name, x in row.arrays.items()}
                record = save(arrays | _stamp(manifest, number))
                with _write_errors(path):
                    writer.write(record)
        finally:
            with _write_errors(path):  # closing writes as well
                writer.close()


def _stamp(manifest: Manifest, row: int) -> dict[str, np.ndarray]:
    """The arrays that bind a record to its capture and its place there."""
    identity = np.frombuffer(bytes.fromhex(manifest.identity), np.uint8)
    return dict(zip(_STAMP, (identity, np.array([row], np.int64)), strict=True))


def _stamp_problem(arrays: dict[str, Any], manifest: Manifest, row: int) -> str | None:
    """What is wrong with the stamp of a record, in a few words; takes it out of the arrays."""
    found = {name: arrays.pop(name, np.zeros(0)) for name in _STAMP}
    expected = _stamp(manifest, row)
    if not np.array_equal(found["capture"], expected["capture"]):
        return f"states of another capture, expected those of {MANIFEST}"
    if not np.array_equal(found["row"], expected["row"]):
        rows = ", ".join(map(str, found["row"].tolist())) or "none"
        return f"found row {rows}, expected row {row}"
    return None


def _header_problem(path: Path, manifest: Manifest, index: int) -> str | None:
    """What is wrong with the header or the count of a shard's records, in a few words."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        # Opened for the header alone: a reader stays open, and shards may outnumber file handles.
        with ArrayRecordDataSource([str(path)]) as records:
            header, found = _arrays(records[0]), len(records) - 1
    except _UNREADABLE as error:
        return f"a damaged shard: {error}"
    problem = _stamp_problem(header, manifest, manifest.first_rows[index])
    if problem:
        return problem
    expected = manifest.shard_rows[index]
    return None if found == expected else f"{found} rows, expected {expected}"


def _arrays(record: bytes) -> dict[str, Any]:
    """The arrays of a record by name."""
    arrays = {}
    for name, tensor in deserialize(record):
        values = np.frombuffer(tensor["data"], _TYPES[tensor["dtype"]])
        arrays[name] = values.reshape(tensor["shape"])
    return arrays


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """ArrayRecord says of a full disk what jax says of a failed computation: a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise write_error(error, path) from error


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Writes the manifest with its own hash."""
    write_json(Path(directory) / MANIFEST, dataclasses.asdict(manifest))


def read_manifest(directory: str | Path) -> Manifest:
    """Reads the manifest of a directory of captured states.

    Raises:
        InputError: there is none, it is not one, or it was changed after it was written.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise InputError(f"{path}: not there; expected a directory that `domino capture` wrote")
    manifest = from_dict(
        Manifest, read_own_json(path, remedy=_CAPTURE_AGAIN, entries=MANY_ENTRIES), source=str(path)
    )
    # Here and not in `Manifest`, which may have no shards as long as they are not planned.
    held = sum(manifest.shard_rows)
    count = len(manifest.row_lengths)
    if held != count:
        raise InputError(f"{path}: shard_rows holds {held} rows, row_lengths {count}")
    return manifest


def check_manifest(directory: str | Path, manifest: Manifest, asked: Mapping[str, Any]) -> None:
    """Refuses captured states that are not what is asked for.

    Args:
        directory: for the message.
        manifest: what the directory holds.
        asked: the fields that must agree, with the values they must have.
    Raises:
        InputError: each field that differs, with what was captured and what is asked.
    """
    # As text: to Python true equals 1, and a list from JSON never equals a tuple.
    differing = [
        f"{name} is {_shown(getattr(manifest, name))}, asked for is {_shown(value)}"
        for name, value in asked.items()
        if settings_text(getattr(manifest, name)) != settings_text(value)
    ]
    if differing:
        raise InputError(f"{directory}: captured otherwise: {'; '.join(differing)}")


def rows_fingerprint(rows: Iterable[Row]) -> str:
    """sha256, in hex, over the ids and masks of rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        # The length as well: without it, rows that are cut elsewhere would hash alike.
        digest.update(len(row.input_ids).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(row.input_ids, np.int32).tobytes())
        digest.update(np.ascontiguousarray(row.loss_mask, np.bool_).tobytes())
    return digest.hexdigest()


def token_spans(rows: Iterable[Row]) -> tuple[int, ...]:
    """The token ids of rows as spans of consecutive ids: first id, end, first id, end, ...

    The ends are exclusive. The ids themselves would be most of a manifest.

    >>> token_spans([Row(np.array([7, 2]), np.ones(2)), Row(np.array([3]), np.ones(1))])
    (2, 4, 7, 8)
    """
    ids = np.unique(np.concatenate([np.unique(row.input_ids) for row in rows]))
    gaps = np.flatnonzero(np.diff(ids) > 1)
    firsts = ids[[0, *(gaps + 1)]]
    ends = ids[[*gaps, -1]] + 1
    return tuple(np.stack([firsts, ends], axis=1).ravel().tolist())


def _require_finite(row: Row, *, source: str, remedy: str) -> None:
    for name, states in (("features", row.features), ("target_states", row.target_states)):
        if states is not None:
            require_finite(states, source=f"{source}: {name}", remedy=remedy)


def _shown(value: Any) -> str:
    # Twelve digits tell two hashes apart, and leave room on the line for what else differs.
    if isinstance(value, str) and len(value) == 64:
        return f"sha256 {value[:12]}"
    if isinstance(value, dict):
        return settings_text(value)
    return str(list(value)) if isinstance(value, tuple) else repr(value)
