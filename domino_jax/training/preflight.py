"""Checks that cost nothing, made before a target is fetched, a row read or a directory made."""

import importlib.util
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax

from domino_jax.base.errors import InputError, shown
from domino_jax.base.output_paths import nearest_existing
from domino_jax.config.model import DraftConfig
from domino_jax.draft.build import boxed_parameters

GIGABYTE = 10**9
# Imported where they are used, so that decoding does without; and what pip calls them.
PACKAGES = {
    "grain": "grain",
    "array_record": "array-record",
    "tensorboardX": "'domino-jax[tensorboard]'",
}


def check_packages(modules: Iterable[str]) -> None:
    """Refuses to begin without a package, a key of `PACKAGES`, and names what to install."""
    for module in modules:
        # Looked for, not imported: a check is to cost nothing.
        if importlib.util.find_spec(module) is None:
            raise InputError(
                f"the package {module} is missing, which this needs: pip install {PACKAGES[module]}"
            )


def check_directory(key: str, directory: str | None, *, lacking: str, expected: str) -> None:
    """Refuses a directory without the file `lacking`; a key of the configuration names it."""
    if directory is not None and not (Path(directory) / lacking).is_file():
        found = _instead(Path(directory), lacking=lacking)
        raise InputError(f"{key}: {directory}: {found}; expected {expected}")


def check_conversations(key: str, name: str | None) -> None:
    """Refuses a file of conversations that is not there; a key of the configuration names it."""
    if name is not None and not (Path(name).is_file() and os.access(name, os.R_OK)):
        raise InputError(
            f"{key}: {name}: {_instead(Path(name))}; expected a JSONL file of conversations"
        )


def check_pattern(run_dir: str | Path) -> None:
    """Refuses a run directory that Orbax would take for a pattern of paths.

    Orbax lists its files with `glob`. In such a directory it finds none of them, or those of
    another run, and no checkpoint can be read.
    """
    path = str(Path(run_dir).resolve())
    odd = "".join(sorted(set("*?[\\") & set(path)))
    if odd:
        raise InputError(
            f"{path}: {shown(odd)} in the path of a run directory, where no checkpoint could be "
            "read; give a directory without *, ?, [ and \\"
        )


def check_one_process(what: str) -> None:
    """Refuses to run in several processes, of which each would write the same files."""
    if jax.process_count() > 1:
        raise InputError(f"{what} runs in one process, found {jax.process_count()}")


def check_room(
    run_dir: str | Path, draft: DraftConfig, *, average: bool, keep: int, keep_best: bool
) -> None:
    """Refuses a run whose checkpoints may not fit the disk.

    Those that are there already count as room.

    Args:
        run_dir: directory of the run.
        draft: gives the number of parameters.
        average: whether a checkpoint has an average of the draft.
        keep: `train.keep_checkpoints`.
        keep_best: whether the best checkpoint is kept too.
    """
    count = checkpoints_at_once(keep, keep_best=keep_best)
    needed = checkpoint_bytes(draft, average=average) * count
    there = (Path(run_dir) / "checkpoints").rglob("*")
    free = free_bytes(run_dir) + sum(path.stat().st_size for path in there if path.is_file())
    if needed > free:
        best = ", train.keep_best" if keep_best else ""
        raise InputError(
            f"run_dir: {run_dir}: {count} checkpoints "
            f"(train.keep_checkpoints {keep}{best} and one being written) "
            f"take up to {needed / GIGABYTE:.3g} GB, {free / GIGABYTE:.3g} GB are free there; make "
            "room, lower train.keep_checkpoints or give another run_dir"
        )


def checkpoint_bytes(draft: DraftConfig, *, average: bool) -> int:
    """Size of a checkpoint at most: parameters, two moments and an average, in float32."""
    copies = 1 + 2 + int(average)
    return 4 * copies * sum(leaf.size for leaf in jax.tree.leaves(boxed_parameters(draft)))


def checkpoints_at_once(keep: int, *, keep_best: bool) -> int:
    """How many checkpoints a run holds at most: the oldest goes once the new one is whole."""
    return keep + int(keep_best) + 1


def free_bytes(path: str | Path) -> int:
    """Room on the disk that holds, or would hold, a path."""
    return shutil.disk_usage(nearest_existing(path)).free


def _instead(path: Path, *, lacking: str = "") -> str:
    """What is wrong with a path."""
    if not path.exists():
        return "not there"
    if lacking:
        return f"no {lacking} in it" if path.is_dir() else "not a directory"
    return "may not be read by this user" if path.is_file() else "not a file"
