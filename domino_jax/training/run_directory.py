"""A run belongs to one configuration and one set of inputs: what may change between two starts.

A run that is resumed with other settings or rows would be neither the one run nor the other. So
both are stored in each checkpoint, under its checksums, and compared. A run that was never saved
may begin with anything.

    run/checkpoints/40/run/      settings and inputs of the start that saved it, compared
    run/checkpoints/40/draft/    the draft and its template, compared
    run/config.yaml              the settings of the last start, written once it is accepted
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError
from domino_jax.training.records import OTHER_VERSION, DraftRecord, Resumed

# What may differ when a run is started again. Nothing of it changes a parameter, but for the mesh
# and logits_mib, which change the order of sums.
_FREE = (
    "data.max_unusable",
    "data.special_tokens_in_text",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.rollout_",
    "train.max_nonfinite_steps",
    "train.profile",
    "train.tensorboard",
    "train.extra_steps",
    "mesh",
    "loss.logits_mib",
    "run_dir",
)
# Where an input lies is free too: what it holds is compared by its hash.
_PLACES = ("target", "data.train", "data.hidden_states", "data.eval", "draft.init_from")


def check_settings(source: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses settings that would train something else than the run was started with.

    Args:
        source: the checkpoint, for messages.
        stored: its resolved configuration as plain values.
        settings: that of this start.
    Raises:
        InputError: each setting that differs, or that only one of the two has.
    """
    unknown = sorted(_keys(stored) ^ _keys(settings))
    if unknown:
        raise InputError(f"{source}: {', '.join(unknown)}: {OTHER_VERSION}")
    before, now = _comparable(stored), _comparable(settings)
    # The options of another objective have other names.
    keys = before.keys() | now.keys()
    changed = {key for key in keys if before.get(key) != now.get(key)}
    if not changed:
        return
    words = "; ".join(f"{key} {before.get(key)!r} -> {now.get(key)!r}" for key in sorted(changed))
    remedy = "use another run_dir"
    # The one change that many want, and for which there is another key.
    if changed <= {"train.steps", "train.epochs"}:
        remedy = (
            "the schedules are stretched over them: train.extra_steps=N trains N steps further at "
            "the last rate"
        )
    raise InputError(f"{source}: started with other settings ({words}); {remedy}")


def check_inputs(resumed: Resumed | None, hashes: Mapping[str, str]) -> None:
    """Refuses inputs that are not those that a run was started with.

    Args:
        resumed: the checkpoint; None of a run that begins, which may read anything.
        hashes: of the inputs that are known by now, by name.
    Raises:
        InputError: each input that changed, then and now.
    """
    if resumed is None:
        return
    stored = resumed.record.inputs
    changed = [
        f"{name}: was {stored.get(name, 'not there')}, is {now}"
        for name, now in hashes.items()
        if stored.get(name) != now
    ]
    if changed:
        # Twelve digits of each hash: the line has room for all that changed.
        words = re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1", "; ".join(changed))
        raise InputError(
            f"{resumed.source}: what the run reads has changed: {words}; use another run_dir"
        )


def check_draft(source: Path, stored: DraftRecord, record: DraftRecord) -> None:
    """Raises `InputError` for a target whose config or template makes another draft."""
    then, now = (dataclasses.asdict(one.config) for one in (stored, record))
    changed = [f"draft {key} {then[key]!r} -> {now[key]!r}" for key in now if then[key] != now[key]]
    if stored.chat_template != record.chat_template:
        changed.append(f"chat template {stored.chat_template} -> {record.chat_template}")
    if changed:
        raise InputError(
            f"{source}: the target has changed: {'; '.join(changed)}; use another run_dir"
        )


def _keys(tree: Mapping[str, Any]) -> set[str]:
    """The keys of a configuration and of its sections."""
    sections = {name: value for name, value in tree.items() if isinstance(value, dict)}
    inside = {f"{name}.{key}" for name, section in sections.items() for key in section}
    return {*tree, *inside}


def _comparable(tree: Mapping[str, Any]) -> dict[str, Any]:
    # By prefix: a section's name frees all of its keys. Of a place only whether it is given counts:
    # captured states instead of conversations, or no held-out rows, are another run.
    flat = {key: value for key, value in _flat(tree).items() if not key.startswith(_FREE)}
    return flat | {key: flat[key] is not None for key in _PLACES if key in flat}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            # A record is read from JSON, which has no tuples.
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
