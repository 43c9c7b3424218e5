"""`evaluation.json` of a run: figures with all that they depend on, and what training said.

{"evaluator": {target, chat template, step, block, seed, ...},
 "training":  {first and last loss, held-out figures},
 "cycle":     {milliseconds of a cycle by part, break-even tau, where and when},
 "sets":      {name: {file, sha256, figures of `SetFigures`, examples, where and when,
                      "endpoint" of `compare_with_server`, if one was asked}, ...},
 "sha256":    of the rest}
"""

import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError
from domino_jax.base.files import read_own_json, write_json
from domino_jax.data.template import ChatTemplate, settings_text

EVALUATION = "evaluation.json"  # its name in a run directory
REMEDY = "run `domino evaluate` again, without --append"  # for a changed evaluation
PACKAGES = ("domino-jax", "jax", "jaxlib", "numpy", "tokenizers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What figures depend on besides the draft and the prompts."""

    target: str
    target_sha256: str | None
    chat_template: ChatTemplate
    step: int
    block_size: int
    head: str | None
    temperature: float
    seed: int
    max_new_tokens: int
    dtype: str

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it."""
        # Not `asdict`, which would take the template apart: it has a form of its own.
        rest = {name: value for name, value in vars(self).items() if name != "chat_template"}
        return {"target": self.target, **self.chat_template.as_json(), **rest}


def measured(device: str) -> dict[str, Any]:
    """When and where a figure was measured: without it, no speed means anything.

    Args:
        device: what computed, as jax calls it.
    """
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "device": device,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def hardware() -> str:
    """The cores of this machine."""
    return f"{os.cpu_count()} x {processor()}"


def processor() -> str:
    """The name of this machine's cores."""
    known = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)", known.read_text() if known.exists() else "", re.M)
    return found[1].strip() if found else platform.processor() or platform.machine()


def set_names(files: Sequence[Path], path: Path) -> list[str]:
    """What files of prompts are called in an evaluation: `prompts/everyday.jsonl.gz` -> everyday.

    Args:
        files: of prompts, one a set.
        path: of the evaluation, for the message.
    Raises:
        InputError: two of them would be one set.
    """
    names = [file.name.split(".jsonl")[0] for file in files]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two files of prompts would both be called {name} in {path}")
    return names


def read_earlier(path: Path, evaluator: Evaluator) -> dict[str, Any]:
    """An evaluation that more sets are added to: its `sets` and `cycle`, which may be None.

    Raises:
        InputError: it was changed, an earlier version wrote it, or it was measured otherwise: with
            another checkpoint or length, for example.
    """
    if not path.exists():
        return {"sets": {}, "cycle": None}
    record = read_own_json(path, remedy=REMEDY)
    known, now = record.get("evaluator"), evaluator.as_json()
    sets, cycle = record.get("sets"), record.get("cycle")
    # Null where nothing was timed.
    if not (isinstance(known, dict) and isinstance(sets, dict) and isinstance(cycle or {}, dict)):
        raise InputError(f"{path}: not an evaluation; remove it, or leave --append out")
    for name, value in now.items():
        # As text: JSON has lists where Python may have tuples.
        if settings_text(known.get(name)) != settings_text(value):
            raise InputError(
                f"{path}: was measured with {name} {settings_text(known.get(name))}, this is "
                f"{settings_text(value)}; leave --append out to replace it"
            )
    return {"sets": sets, "cycle": cycle}


def write_evaluation(
    path: Path,
    evaluator: Evaluator,
    *,
    training: Mapping[str, Any],
    cycle: Mapping[str, Any] | None,
    sets: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes an evaluation with its own hash, and returns it without.

    Args:
        path: the file.
        evaluator: of all sets.
        training: figures of the run's log.
        cycle: `CycleTimes.as_json` and where it was measured; None where nothing was timed.
        sets: name -> its file and the figures of `SetFigures.as_json`.
    """
    record = {"evaluator": evaluator.as_json(), "training": training, "cycle": cycle, "sets": sets}
    write_json(path, record, indent=1)
    return record
