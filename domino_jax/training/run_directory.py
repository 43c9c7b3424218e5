"""A run directory belongs to one configuration: what may change between two starts, and what may not."""

import dataclasses
from pathlib import Path
from typing import Any

from domino_jax.config import RunConfig, dump_config, load_config
from domino_jax.files import write_whole
from domino_jax.strict import InputError

# What may differ when a run is started again: nothing that changes its numbers.
_FREE_TO_CHANGE = (
    *("train.log_every", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints"),
    *("train.max_bad_steps", "train.profile"),
    *("mesh", "loss.logits_mib"),  # change no more than the order of sums
)


def claim(directory: Path, config: RunConfig, *, started: bool) -> None:
    """Creates the run directory with the resolved config, or checks one that has a checkpoint.

    Raises:
        InputError: it was started with other settings, or by another version that had others.
    """
    path = directory / "config.yaml"
    if not (started and path.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, dump_config(config))
        return
    try:
        started_as = load_config(path)
    except InputError as error:
        raise InputError(
            f"{error}: the run was started by another version of this program and cannot be resumed by this one; "
            "use another run_dir, which may begin with the old run's export (draft.init_from)"
        ) from error
    before, now = (_flat(dataclasses.asdict(one)) for one in (started_as, config))
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith((*_FREE_TO_CHANGE, "run_dir", "train.tensorboard"))
    ]
    if changed:
        raise InputError(f"{path}: started with other settings ({'; '.join(changed)}); use another run_dir")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
