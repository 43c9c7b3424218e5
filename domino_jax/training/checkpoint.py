"""Orbax checkpoints of a run: draft, optimiser, data position, and what a reader needs to use the draft alone."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from domino_jax.data.template import ChatTemplate, recorded_kwargs
from domino_jax.draft.backbone import DraftModel, init_variables
from domino_jax.model_config import DraftConfig
from domino_jax.strict import InputError, from_tree
from domino_jax.training.step import TrainState


class DraftRecord(NamedTuple):
    """A draft, the built-in name or directory of its target, and the template of its rows."""

    config: DraftConfig
    target: str
    chat_template: ChatTemplate


def open_checkpoints(run_dir: str | Path, *, keep: int = 2) -> ocp.CheckpointManager:
    """The checkpoints of a run; the newest `keep` stay. A save that was cut off is never picked up."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager((Path(run_dir) / "checkpoints").resolve(), options=options)


def has_checkpoint(run_dir: str | Path) -> bool:
    """Whether a run directory holds a finished checkpoint."""
    if not (Path(run_dir) / "checkpoints").is_dir():
        return False
    with open_checkpoints(run_dir) as checkpoints:
        return checkpoints.latest_step() is not None


def save_checkpoint(
    checkpoints: ocp.CheckpointManager, state: TrainState, rows: Any, record: DraftRecord, *, wait: bool = False
) -> None:
    """Saves state and data position under the state's step, in the background unless `wait`."""
    import grain.checkpoint

    items: dict[str, Any] = {
        "params": ocp.args.StandardSave(state.params),
        "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
        "data": grain.checkpoint.CheckpointSave(rows),
        "draft": ocp.args.JsonSave(_record_json(record)),
    }
    if state.ema is not None:
        items["ema"] = ocp.args.StandardSave(state.ema)
    checkpoints.save(int(state.step), args=ocp.args.Composite(**items))
    if wait:
        checkpoints.wait_until_finished()


def save_draft(run_dir: str | Path, params: Any, record: DraftRecord) -> None:
    """Starts a run directory from a draft alone, as step 0 without optimiser state."""
    with open_checkpoints(run_dir) as checkpoints:
        items = {"params": ocp.args.StandardSave(params), "draft": ocp.args.JsonSave(_record_json(record))}
        checkpoints.save(0, args=ocp.args.Composite(**items))


def restore_checkpoint(
    checkpoints: ocp.CheckpointManager, state: TrainState, rows: Any, record: DraftRecord
) -> tuple[TrainState, Any] | None:
    """The newest checkpoint, laid out like `state`, with the row iterator set to where it was; None if there is none.

    Raises:
        InputError: the checkpoint holds an imported draft without optimiser state, or its draft, target or chat
            template is not the one of `record`: the target's files have changed since.
    """
    import grain.checkpoint  # here: a draft alone is read without it

    step = checkpoints.latest_step()
    if step is None:
        return None
    if "optimizer" not in _item_names(checkpoints, step):
        raise InputError(
            f"{checkpoints.directory}: an imported draft without optimiser state cannot be continued; "
            "give its checkpoint as draft.init_from of another run_dir"
        )
    stored = _read_record(checkpoints, step)
    for name, then, now in zip(DraftRecord._fields, stored, record, strict=True):
        if then != now:
            raise InputError(f"{checkpoints.directory}/{step}: {name} was {then}, now it is {now}; use another run_dir")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    items: dict[str, Any] = {
        "params": ocp.args.StandardRestore(abstract.params),
        "optimizer": ocp.args.StandardRestore({"step": abstract.step, "opt_state": abstract.opt_state}),
        "data": grain.checkpoint.CheckpointRestore(rows),
    }
    if state.ema is not None:
        items["ema"] = ocp.args.StandardRestore(abstract.ema)
    restored = checkpoints.restore(step, args=ocp.args.Composite(**items))
    optimizer = restored["optimizer"]
    ema = restored["ema"] if state.ema is not None else None
    return TrainState(optimizer["step"], restored["params"], optimizer["opt_state"], ema), restored["data"]


def load_draft(run_dir: str | Path) -> tuple[DraftRecord, Any, int]:
    """The newest draft of a run: its record, its parameters (the average, if one is kept) and its step.

    Raises:
        InputError: the directory holds no finished checkpoint.
    """
    directory = Path(run_dir) / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"{run_dir}: not a run directory (no checkpoints/ in it)")
    with open_checkpoints(run_dir) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise InputError(f"{directory}: no finished checkpoint yet")
        record = _read_record(checkpoints, step)
        config = record.config
        item = "ema" if "ema" in _item_names(checkpoints, step) else "params"
        shapes = jax.eval_shape(lambda: nn.meta.unbox(init_variables(DraftModel(config), jax.random.key(0)))["params"])
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=device), shapes)
        restored = checkpoints.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(shapes)}))
    return record, restored[item], step


def _read_record(checkpoints: ocp.CheckpointManager, step: int) -> DraftRecord:
    stored = checkpoints.restore(step, args=ocp.args.Composite(draft=ocp.args.JsonRestore()))["draft"]
    place = f"{checkpoints.directory}/{step}/draft"
    config = from_tree(DraftConfig, stored["config"], place=place)
    template = ChatTemplate(stored["chat_template"], recorded_kwargs(stored, place=place))
    return DraftRecord(config, stored["target"], template)


def _item_names(checkpoints: ocp.CheckpointManager, step: int) -> set[str]:
    return {path.name for path in (Path(checkpoints.directory) / str(step)).iterdir() if path.is_dir()}


def _record_json(record: DraftRecord) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(record.config),
        "target": record.target,
        **record.chat_template.as_json(),
    }
