"""Orbax checkpoints of a run that may be killed at any moment, and whose files may rot.

A damaged checkpoint would train on in silence. So one is read only where each of its files still
has its hash; what is damaged is named, and the newest one that is not takes its place. Where none
is left, a run refuses to begin again.

    run/checkpoints/40/params/ optimizer/ ema/  arrays; the draft alone is read from one of them
                       data/                    position in the shuffled rows
                       draft/ run/              DraftRecord, RunRecord
                       metrics/                 the figures that the best is kept by
                       SHA256SUMS               of all of them, written before 40 gets its name
    run/newest_checkpoint.json                  so that a checkpoint that is gone is missed
    run/set_aside/                              checkpoints that were damaged
"""

import asyncio
import functools
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from domino_jax.base.errors import InputError
from domino_jax.base.files import damage, read_json, read_own_json, write_checksums, write_json
from domino_jax.base.progress import STDERR, Reporter
from domino_jax.config.sections import BEST_FIGURES
from domino_jax.draft.build import boxed_parameters
from domino_jax.training.checkpoint_names import CHECKPOINTS, DRAFT, RUN, saved_steps
from domino_jax.training.records import DraftRecord, RunRecord, read_draft_record, recorded_step
from domino_jax.training.step import TrainState

NEWEST = "newest_checkpoint.json"
SET_ASIDE = "set_aside"
COMMITTED = "commit_success.txt"  # Orbax writes it into a step after the checksums


class _CheckedDirectory(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """A directory that is hashed before it is renamed to its place."""

    _metadata_store: Any = None

    @classmethod
    def from_final(
        cls, final_path: Any, *, checkpoint_metadata_store: Any = None, **options: Any
    ) -> Any:
        # Orbax's own class gets no store: it would write times into a file that is hashed already.
        path = super().from_final(final_path, **options)
        path._metadata_store = checkpoint_metadata_store
        return path

    async def create(self) -> Any:
        path = await super().create()
        if self._is_step:
            # Readers of Orbax warn of a step that lacks the file.
            (path / "_CHECKPOINT_METADATA").write_text("{}")
        return path

    async def finalize(self) -> None:
        if not self._is_step:
            await super().finalize()
            return
        final = Path(self.get_final())
        # A thread of the store writes `_CHECKPOINT_METADATA`, the one file that nothing has waited
        # for: every item is complete before Orbax calls this.
        if self._metadata_store is not None:
            await asyncio.to_thread(self._metadata_store.wait_until_finished)
        # Before the rename, so that a step under its own name always has its hashes; in a thread,
        # because this is Orbax's event loop.
        await asyncio.to_thread(write_checksums, Path(self.get()))
        await super().finalize()
        # Behind the rename: killed between the two, a run would miss a checkpoint that never was.
        write_json(final.parent.parent / NEWEST, {"step": int(final.name)})

    @property
    def _is_step(self) -> bool:
        """Orbax uses the class for the items within a step too."""
        return Path(self.get_final()).parent.name == CHECKPOINTS


def open_checkpoints(
    run_dir: str | Path, *, keep: int = 2, keep_best: str | None = None
) -> ocp.CheckpointManager:
    """The checkpoints of a run, to write to.

    Args:
        run_dir: the run's directory; it is made where missing.
        keep: the newest so many stay.
        keep_best: the best by its figures of this split (`BEST_FIGURES`) stays too.
    """
    policies = ocp.checkpoint_managers
    kept: Any = policies.LatestN(keep)
    figure = None
    if keep_best is not None:
        figure = functools.partial(_figure, split=keep_best)
        # Steps between two such passes have no figures: they stay while they are new.
        best = policies.BestN(get_metric_fn=figure, n=1, keep_checkpoints_without_metrics=False)
        kept = policies.AnyPreservationPolicy([kept, best])
    options = ocp.CheckpointManagerOptions(
        preservation_policy=kept,
        best_fn=figure,  # without it metrics are not stored
        create=True,
        cleanup_tmp_directories=True,  # of saves that were killed
        temporary_path_class=_CheckedDirectory,
    )
    return ocp.CheckpointManager(_directory(run_dir), options=options)


def sound_checkpoint(
    run_dir: str | Path, *, reporter: Reporter, set_aside: bool = False, only: int | None = None
) -> int | None:
    """The newest step whose files are all as they were saved, or None where none was ever saved.

    A directory that was renamed or copied to another step is not used, like a damaged one.

    Args:
        run_dir: the run's directory; nothing in it needs to exist.
        reporter: is told each damaged step that is passed over.
        set_aside: move damaged steps to `set_aside/` of the run, so that their steps can be saved
            again.
        only: the one step that is wanted.
    Raises:
        InputError: checkpoints were saved and none can be used, or not `only`.
    """
    directory = _directory(run_dir)
    run_dir = Path(run_dir)
    recorded = _recorded_step(run_dir)
    steps = saved_steps(directory)
    if only is not None and only not in steps:
        raise InputError(
            f"{directory}: no checkpoint {only}; there are {', '.join(map(str, steps)) or 'none'}"
        )
    if recorded is not None and only is None and (not steps or recorded > steps[0]):
        reporter.say(f"{directory}/{recorded}: the newest checkpoint is gone")
    for step in steps if only is None else [only]:
        checkpoint = directory / str(step)
        found = damage(checkpoint, unlisted=[COMMITTED]) or _misplaced(checkpoint)
        if found is None:
            return step
        moved = ""
        if set_aside and jax.process_index() == 0:
            moved = f"; moved to {_put_aside(run_dir, checkpoint)}"
        reporter.say(f"{checkpoint}: damaged, not used: {found}{moved}")
    if steps or recorded is not None:
        raise InputError(
            f"{directory}: no undamaged checkpoint is left; put one back, or begin again in "
            "another run_dir"
        )
    return None


class Checkpoints:
    """The checkpoints of a run that trains; what fails while one is written is one line."""

    def __init__(self, run_dir: Path, *, keep: int, keep_best: str | None) -> None:
        self._directory = _directory(run_dir)
        self._keep_best = keep_best
        with self._told(None):
            self._manager = open_checkpoints(run_dir, keep=keep, keep_best=keep_best)
        self._writing: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self.wait()
            self._manager.close()
        except InputError:
            if kind is None:  # an error that is on its way is the cause, and not to be hidden
                raise

    def wait(self) -> None:
        """Waits for the save in the background.

        Raises:
            InputError: it failed; its files are removed.
        """
        with self._told(self._writing):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._writing = None

    def newest(self) -> int | None:
        """The newest step that is saved; waits for one in the background."""
        self.wait()
        return self._manager.latest_step()

    def saved(self, step: int) -> bool:
        """Whether a step is saved, or being saved."""
        return self._manager.latest_step() == step

    def save(
        self,
        state: TrainState,
        batches: Any,
        draft: DraftRecord,
        run: RunRecord,
        *,
        figures: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Saves a state in the background, under its step.

        Args:
            state: of the run.
            batches: iterator whose position is saved.
            draft: what a reader of the draft needs.
            run: what the run is resumed with.
            figures: by split, of the passes of this step; the best is kept by one of them.
        Raises:
            InputError: this one or the one before could not be written.
        """
        import grain.checkpoint

        self.wait()  # for the save before, whose failure nobody has been told yet
        # Draft and optimiser are two items: who reads a draft alone reads a third of the bytes.
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            "data": grain.checkpoint.CheckpointSave(batches),
            DRAFT: ocp.args.JsonSave(draft.as_json(step=int(state.step))),
            RUN: ocp.args.JsonSave(run.as_json()),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        metrics = {split: dict(figures[split]) for split in figures if split == self._keep_best}
        step = int(state.step)
        with self._told(step):
            self._writing = step
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics or None)

    def restore(self, step: int, state: TrainState, batches: Any) -> tuple[TrainState, Any]:
        """State and iterator of a checkpoint that `sound_checkpoint` found.

        Args:
            step: of the checkpoint.
            state: arrays or shapes, whose layout the result has.
            batches: an iterator over the run's rows.
        Raises:
            InputError: it does not fit the run.
        """
        import grain.checkpoint  # here: a draft alone is read without it

        # With the shardings of this start: another mesh may have saved it.
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(abstract.params),
            "optimizer": ocp.args.StandardRestore(
                {"step": abstract.step, "opt_state": abstract.opt_state}
            ),
            "data": grain.checkpoint.CheckpointRestore(batches),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardRestore(abstract.ema)
        restored = _restored(self._manager, step, items)
        optimizer = restored["optimizer"]
        saved_step = int(optimizer["step"])
        if saved_step != step:  # only where an earlier version saved it: its record has no step
            raise InputError(
                f"{self._directory}/{step}: the state of step {saved_step}, expected that of step "
                f"{step}; rename the directory to {saved_step}"
            )
        restored_state = TrainState(
            optimizer["step"], restored["params"], optimizer["opt_state"], restored.get("ema")
        )
        return restored_state, restored["data"]

    @contextmanager
    def _told(self, step: int | None) -> Iterator[None]:
        """Tells a failed write in one line: TensorStore's ValueError, the others' OSError."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if step is not None:
                # What is half written takes the room that the next try needs.
                shutil.rmtree(self._directory / f"{step}.orbax-checkpoint-tmp", ignore_errors=True)
            kept = [one for one in saved_steps(self._directory) if one != step]
            whole = f"checkpoint {kept[0]} is whole" if kept else "no earlier one is there"
            what = "checkpoints" if step is None else f"checkpoint {step}"
            raise InputError(
                f"{self._directory}: {what} could not be written: {_reason(error)}; {whole}; "
                "once it can be written, the same command resumes"
            ) from error


def save_draft(run_dir: str | Path, params: Any, record: DraftRecord) -> None:
    """Starts a run directory from a draft alone, as step 0 without optimiser state."""
    with open_checkpoints(run_dir) as checkpoints:
        items = {
            "params": ocp.args.StandardSave(params),
            DRAFT: ocp.args.JsonSave(record.as_json(step=0)),
        }
        checkpoints.save(0, args=ocp.args.Composite(**items))


@dataclass(frozen=True)
class StoredDraft:
    """A draft of a run at a step; `params` are the average where one is kept."""

    record: DraftRecord
    params: Any
    step: int


def load_draft(
    run_dir: str | Path, *, reporter: Reporter = STDERR, step: int | None = None
) -> StoredDraft:
    """The newest undamaged draft of a run, or that of a `step`.

    Raises:
        InputError: the directory holds no such checkpoint.
    """
    directory = _directory(run_dir)
    found = sound_checkpoint(run_dir, reporter=reporter, only=step)
    if found is None:
        if directory.is_dir():
            raise InputError(f"{run_dir}: no finished checkpoint yet")
        raise InputError(f"{run_dir}: not a run directory (no checkpoints/ in it)")
    checkpoint = directory / str(found)
    record = read_draft_record(checkpoint)
    item = "ema" if (checkpoint / "ema").is_dir() else "params"
    # On one device, whatever mesh trained it: who reads a draft decodes or exports.
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=device),
        nn.meta.unbox(boxed_parameters(record.config)),
    )
    # Read only: the run may be training, and a reader changes nothing of it.
    with ocp.CheckpointManager(
        directory, options=ocp.CheckpointManagerOptions(read_only=True)
    ) as checkpoints:
        restored = _restored(checkpoints, found, {item: ocp.args.StandardRestore(shapes)})
    return StoredDraft(record, restored[item], found)


def _directory(run_dir: str | Path) -> Path:
    return (Path(run_dir) / CHECKPOINTS).resolve()


def _recorded_step(run_dir: Path) -> int | None:
    """The newest step that was ever saved, None where the run has no record of it."""
    path = run_dir / NEWEST
    if not path.exists():
        return None
    remedy = f"remove the file if {CHECKPOINTS}/ is whole"
    tree = read_json(path)
    # An earlier version wrote the step alone.
    if tree.keys() != {"step"}:
        tree = read_own_json(path, remedy=remedy)
    step = tree.get("step")
    if type(step) is not int:  # to `isinstance` true is an integer
        raise InputError(f"{path}: step is {step!r}, expected an integer; {remedy}")
    return step


def _misplaced(checkpoint: Path) -> str | None:
    """Why an undamaged directory is not the checkpoint of the step in its name; None if it is."""
    try:
        step = recorded_step(checkpoint)
    except InputError as error:
        return str(error)
    if step is None or step == int(checkpoint.name):
        return None
    return f"the state of step {step}, expected that of step {checkpoint.name}"


def _put_aside(run_dir: Path, checkpoint: Path) -> Path:
    to = run_dir / SET_ASIDE / checkpoint.name
    number = 1
    # A step that was set aside is trained and saved again, and may be damaged again.
    while os.path.lexists(to):
        number += 1
        to = to.with_name(f"{checkpoint.name}.{number}")
    to.parent.mkdir(exist_ok=True)
    checkpoint.rename(to)
    return to


def _figure(metrics: Any, *, split: str) -> float:
    # Below all others: saved when a start kept the best by another split.
    return metrics.get(split, {}).get(BEST_FIGURES[split], -math.inf)


def _reason(error: Exception) -> str:
    """The system's own words where they stand in a library's message."""
    full = "No space left on device"
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    return full if full in words else words[:200]


def _restored(checkpoints: ocp.CheckpointManager, step: int, items: Mapping[str, Any]) -> Any:
    try:
        return checkpoints.restore(step, args=ocp.args.Composite(**items))
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{checkpoints.directory}/{step}: does not fit: {reason}") from error
