"""Captures the target's states of the training rows, for runs that do not run the target.

The target's forward is most of a step, and every run over the same rows repeats it. So it can be
run once, and its states stored in the order of the rows:

    DIR/manifest.json                        target, rows and shards of the capture, written first
    DIR/shard-00000.arrayrecord              row 0, row 1, ...: ids and mask [n], features [n, C*D]
                                             and, if asked for, target_states [n, D]
    DIR/.shard-00001.arrayrecord.5be11e90    an unfinished shard; renamed once it is whole
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.lock import LOCK
from domino_jax.base.progress import Bar, Reporter
from domino_jax.data.conversations import Row
from domino_jax.data.hidden_states import (
    MANIFEST,
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
from domino_jax.data.packing import answer_tokens, row_lengths
from domino_jax.data.pipeline import heldout_batches
from domino_jax.data.template import NO_KWARGS
from domino_jax.sharding import constrain
from domino_jax.target.fingerprint import target_fingerprint
from domino_jax.target.load import load_sharded_target
from domino_jax.training.inputs import device_batch
from domino_jax.training.preflight import GIGABYTE, free_bytes
from domino_jax.training.prepare import CaptureInputs
from domino_jax.training.program import scanned_target
from domino_jax.training.step import Batch

LENGTH_STEP = 64  # padding that the target runs over, at most; a power of 2, for any mesh
SHARD_BYTES = GIGABYTE // 4  # what an interruption costs at most


def capture(
    read_inputs: Callable[[Scalars], CaptureInputs],
    directory: str | Path,
    *,
    dtype: str,
    target_states: bool,
    limit_gb: float,
    confirmed: bool,
    reporter: Reporter,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the captured states of `data.train` to a directory, or resumes an earlier start.

    Shards that are there are read once: whole ones stay as they are, damaged ones are written
    again. Rows are not packed: a run may pack them or not.

    Args:
        read_inputs: returns rows and target from the template kwargs of an earlier start; called
            once the directory is accepted.
        directory: for `data.hidden_states` of runs; made where missing.
        dtype: stored type, "float32" or "bfloat16".
        target_states: store the target's states after its final norm as well, which needs all of
            its layers.
        limit_gb: more than this many gigabytes are written only when confirmed.
        confirmed: the size has been agreed to.
        reporter: is told the size before anything is written, and each shard.
        shard_bytes: size of a shard.
    Raises:
        InputError: no rows, a directory that holds something else, too much for the limit or the
            disk, or several processes.
    """
    directory = Path(directory)
    _check_directory(directory)
    begun = (directory / MANIFEST).is_file()
    inputs = read_inputs(read_manifest(directory).chat_template_kwargs if begun else NO_KWARGS)
    rows, mesh = inputs.rows, inputs.mesh
    layers, config = inputs.target_layer_ids, inputs.target_config
    asked = Manifest(
        target=target_fingerprint(inputs.target),
        tokenizer=inputs.tokenizer_sha256,
        rows=rows_fingerprint(rows),
        target_layer_ids=layers,
        hidden_size=config.hidden_size,
        dtype=dtype,
        compute_dtype=config.dtype,
        **vars(inputs.settings),
        target_states=target_states,
        row_lengths=tuple(row_lengths(rows)),
        shard_rows=(),
        answer_tokens=answer_tokens(rows),
        token_spans=token_spans(rows),
    )
    manifest = _planned(directory, asked, shard_bytes=shard_bytes)
    # Before the target is loaded: a size that is refused should cost seconds.
    missing = _agreed(
        directory, manifest, limit_gb=limit_gb, confirmed=confirmed, reporter=reporter
    )
    if not missing:
        reporter.say("every shard is there")
        return
    reporter.say(f"loading the target {inputs.target}, {config.dtype}")
    # Nothing reads the layers behind the last captured one, but for the final norm's states.
    depth = config.num_hidden_layers if target_states else max(layers) + 1
    target = scanned_target(config, capture=layers, depth=depth, mesh=mesh, packed=False)
    params = load_sharded_target(inputs.target, target, mesh).params

    @jax.jit
    def states(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        tokens = constrain(batch.input_ids[0], "batch", "length")
        output = target.apply({"params": params}, tokens)
        # Cast here and not on the host: as bfloat16 half the bytes leave the device.
        final = output.hidden.astype(dtype) if target_states else None
        return output.features.astype(dtype), final

    directory.mkdir(parents=True, exist_ok=True)  # not earlier: what is refused leaves nothing
    # Before its shards: without a manifest nobody could tell what they are, or resume them.
    write_manifest(directory, manifest)
    # Left by a killed start: a capture has one owner, so no other process writes them now.
    for pattern in (f".{MANIFEST}.*", ".shard-*.arrayrecord.*"):
        for unfinished in directory.glob(pattern):
            unfinished.unlink()
    with jax.set_mesh(mesh):
        reporter.say("compiling")
        written = 0
        began = time.monotonic()
        shards = len(manifest.shard_rows)
        done = len(rows) - sum(manifest.shard_rows[index] for index in missing)
        with reporter.bar("rows", total=len(rows), done=done) as bar:
            for index in missing:
                first = manifest.first_rows[index]
                part = rows[first : first + manifest.shard_rows[index]]
                captured = _captured_rows(
                    part,
                    lambda batch: states(params, device_batch(mesh, batch, micro_batches=1)),
                    batch_size=inputs.batch_size,
                    max_length=inputs.settings.max_length,
                )
                counted = _counted(captured, bar, done)
                write_shard(directory, index, counted, manifest=manifest)
                written += len(part)
                done += len(part)
                speed = written / (time.monotonic() - began)
                bar.tell(done, f"shard {index + 1} of {shards} written, {speed:.1f} rows/s")


def _check_directory(directory: Path) -> None:
    """Refuses a directory that holds something else than captured states."""
    if (directory / MANIFEST).is_file():
        return
    if not directory.exists():
        return
    # A killed first start leaves its lock and an unfinished manifest, which precedes all shards.
    unfinished = f".{MANIFEST}."
    if not directory.is_dir() or any(
        path.name != LOCK and not path.name.startswith(unfinished) for path in directory.iterdir()
    ):
        raise InputError(
            f"{directory}: not an empty directory and not one of captured states; give a new one"
        )


def _planned(directory: Path, manifest: Manifest, *, shard_bytes: int) -> Manifest:
    """The manifest with its shards: new ones, or those of an earlier start of the same capture."""
    if (directory / MANIFEST).is_file():
        found = read_manifest(directory)
        # `rows` attests lengths and ids too; shards stay cut as they were when they were begun.
        attested = ("row_lengths", "token_spans", "shard_rows")
        names = [name for name in Manifest.__annotations__ if name not in attested]
        check_manifest(directory, found, {name: getattr(manifest, name) for name in names})
        return found
    sizes = [length * manifest.token_bytes for length in manifest.row_lengths]
    return replace(manifest, shard_rows=shard_sizes(sizes, shard_bytes=shard_bytes))


def _agreed(
    directory: Path, manifest: Manifest, *, limit_gb: float, confirmed: bool, reporter: Reporter
) -> list[int]:
    """The shards still to be written, once their size is told and within limit and disk."""
    tokens = sum(manifest.row_lengths)
    total = tokens * manifest.token_bytes
    missing, left = [], 0
    with reporter.bar("shards checked", total=len(manifest.shard_rows)) as bar:
        for index, first in enumerate(manifest.first_rows):
            problem = shard_problem(directory, index, manifest)
            bar.update(index + 1)
            if problem is None:
                continue
            missing.append(index)
            end = first + manifest.shard_rows[index]
            left += sum(manifest.row_lengths[first:end]) * manifest.token_bytes
            path = shard_path(directory, index)
            if path.exists():  # shards are renamed when they are whole: this one changed later
                reporter.say(f"{path}: {problem}; it is written again")
    done = "" if left == total else f", {left / GIGABYTE:.3g} GB of it still to be written"
    reporter.say(
        f"{directory}: {total / GIGABYTE:.3g} GB for {tokens} tokens of "
        f"{len(manifest.row_lengths)} rows, {manifest.token_bytes} bytes each{done}"
    )
    # The limit is on all that will lie there, the disk has to hold only what is missing.
    if total > limit_gb * GIGABYTE and not confirmed:
        raise InputError(
            f"{directory}: would take {total / GIGABYTE:.3g} GB, above the limit of "
            f"{limit_gb:g} GB; --yes writes it all the same, --limit-gb sets another limit"
        )
    free = free_bytes(directory)
    if left > free:
        raise InputError(
            f"{directory}: {left / GIGABYTE:.3g} GB to be written, {free / GIGABYTE:.3g} GB free "
            "on the disk"
        )
    return missing


def _counted(rows: Iterable[Row], bar: Bar, done: int) -> Iterator[Row]:
    """The rows; moves a bar by each from `done` on."""
    for count, row in enumerate(rows, start=1):
        yield row
        bar.update(done + count)


def _captured_rows(
    rows: Sequence[Row],
    states: Callable[[dict[str, np.ndarray]], tuple[jax.Array, jax.Array | None]],
    *,
    batch_size: int,
    max_length: int,
) -> Iterator[Row]:
    """The same rows with what the target computes for them, `states` of a batch."""
    batches = heldout_batches(rows, batch_size=batch_size, max_length=max_length)
    for index, batch in enumerate(batches):
        # By the rows and not by the batch, whose last slots may be filled up with empty rows.
        own_rows = rows[index * batch_size : (index + 1) * batch_size]
        longest = max(len(row.input_ids) for row in own_rows)
        # Cut behind the longest row: the target sees nothing that lies behind a token. One program
        # is compiled for each multiple of `LENGTH_STEP`.
        length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max_length)
        shorter = {name: batch[name][:, :length] for name in ("input_ids", "loss_mask")}
        features, final = jax.device_get(states(shorter))
        for slot, row in enumerate(own_rows):
            own = slice(len(row.input_ids))
            target_states = None if final is None else final[slot, own]
            yield replace(row, features=features[slot, own], target_states=target_states)
