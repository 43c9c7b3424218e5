"""Copies of a target directory with something changed."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

ABSENT = object()


def edited(
    source: Path, directory: Path, *, config: dict[str, Any] | None = None, tensors: Any = None
) -> Path:
    """A copy of a directory with changed config keys and tensors.

    ABSENT removes a key; the tensors pass through a function.
    """
    directory = directory / "model"
    shutil.copytree(source, directory)
    tree = json.loads((directory / "config.json").read_text()) | (config or {})
    tree = {key: value for key, value in tree.items() if value is not ABSENT}
    (directory / "config.json").write_text(json.dumps(tree))
    if tensors is not None:
        arrays = load_file(directory / "model.safetensors")
        save_file(tensors(arrays) or arrays, directory / "model.safetensors")
    return directory
