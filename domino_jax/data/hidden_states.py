"""Captured states of the target on disk: ArrayRecord shards of rows, and a manifest.

Runs over the same rows would repeat the target's forward, which is most of a step. Written once,
its states are read row by row as training needs them; the manifest says what they are, so that
states of another target, template or layer are refused and not trained on:

    manifest.json             written first; says how many rows each shard will hold
    shard-00000.arrayrecord   rows 0 .. shard_rows[0] - 1, one record each: a safetensors of arrays
    shard-00001.arrayrecord   the next shard_rows[1]; renamed to its name once it is whole
"""

import bisect
import dataclasses
import hashlib
import json
import os
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
from domino_jax.base.files import checked_file, file_sha256, read_json, write_error, write_whole
from domino_jax.base.finite import require_finite
from domino_jax.config.sizes import SIZE_LIMIT
from domino_jax.data.conversations import Row
from domino_jax.data.template import settings_text

MANIFEST = "manifest.json"
# By the names of safetensors, and no more of them than a capture may hold.
_TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "BOOL": np.bool_}
_BYTES = {"float32": 4, "bfloat16": 2}


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
            InputError: no capture, an unfinished one, a file that cannot be read, or a shard that
                is a link out of the directory.
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
        try:
            self._records = ArrayRecordDataSource([str(path) for path in shards])
        except RuntimeError as error:
            raise InputError(f"{directory}: a damaged shard: {error}") from error
        held, count = len(self._records), len(self.lengths)
        if held != count:
            raise InputError(f"{directory}: {held} records, the manifest says {count}")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the manifest: of what was captured, and how."""
        return file_sha256(self._directory / MANIFEST)

    # One row at a time, never a slice.
    def __getitem__(self, number: int) -> Row:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)  # ends an iteration
        try:
            arrays: dict[str, Any] = {}
            for name, tensor in deserialize(self._records[number]):
                values = np.frombuffer(tensor["data"], _TYPES[tensor["dtype"]])
                arrays[name] = values.reshape(tensor["shape"])
            row = Row(**arrays)
            self._check_row(number, row)
        except InputError:  # a ValueError as well, which says already what is wrong
            raise
        except (RuntimeError, SafetensorError, KeyError, TypeError, ValueError) as error:
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


def is_whole(directory: str | Path, index: int, count: int) -> bool:
    """Whether shard `index` is there with all of its `count` rows.

    It is read once, which checks the hash of each record.
    """
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    path = shard_path(directory, index)
    if not path.is_file():
        return False
    try:
        records = ArrayRecordDataSource([str(path)])
        # No record is empty: what counts is that each of them could be read.
        return len(records) == count and all(records[number] for number in range(count))
    except RuntimeError:
        return False


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


def write_shard(directory: str | Path, index: int, rows: Iterable[Row]) -> None:
    """Writes rows as one shard, beside its place first: a shard that is there is whole.

    Raises:
        InputError: states of a row that are not finite; no shard is there then.
        OSError: it could not be written; likewise.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    path = shard_path(directory, index)
    beside = path.with_suffix(".partial")
    try:
        with _write_errors(path):
            # For random access; floats hardly compress.
            writer = ArrayRecordWriter(str(beside), "group_size:1,uncompressed")
        try:
            for row in rows:
                source = f"{directory}: line {row.line} of the conversations was not captured"
                _require_finite(
                    row, source=source, remedy="leave the line out, or capture in float32"
                )
                arrays = {name: np.ascontiguousarray(x) for name, x in row.arrays.items()}
                record = save(arrays)
                with _write_errors(path):
                    writer.write(record)
        finally:
            with _write_errors(path):  # closing writes as well
                writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """ArrayRecord says of a full disk what jax says of a failed computation: a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise write_error(error, path) from error


def write_manifest(directory: str | Path, manifest: Manifest) -> None:
    """Writes the manifest, beside its place first."""
    text = json.dumps(dataclasses.asdict(manifest)) + "\n"
    write_whole(Path(directory) / MANIFEST, text)


def read_manifest(directory: str | Path) -> Manifest:
    """Reads the manifest of a directory of captured states.

    Raises:
        InputError: there is none, or it is not one.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise InputError(f"{path}: not there; expected a directory that `domino capture` wrote")
    manifest = from_dict(Manifest, read_json(path), source=str(path))
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
