"""A tau says nothing without its evaluator: another template or block size gives another one.

So `evaluation.json` of a run holds both, with what training said of the same draft:

    {"evaluator": {target, chat template, step, block, proposals, ...},
     "training":  {first and last loss, held-out figures},
     "sets":      {name: {file, figures of `SetFigures`}, ...}}
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.data.template import ChatTemplate
from domino_jax.files import write_whole

EVALUATION = "evaluation.json"  # its name in a run directory


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What figures depend on besides the draft and the prompts."""

    target: str
    chat_template: ChatTemplate
    step: int
    block_size: int
    proposals: int
    temperature: float
    max_new_tokens: int
    dtype: str
    device: str

    def as_json(self) -> dict[str, Any]:
        """As `evaluation.json` holds it."""
        # Not `asdict`, which would take the template apart: it has a form of its own.
        rest = {name: value for name, value in vars(self).items() if name != "chat_template"}
        return {"target": self.target, **self.chat_template.as_json(), **rest}


def write_evaluation(
    path: Path,
    evaluator: Evaluator,
    *,
    training: Mapping[str, Any],
    sets: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Writes an evaluation, whole, and returns what was written.

    Args:
        path: the file.
        evaluator: of all sets.
        training: figures of the run's log.
        sets: name -> `file` and the figures of `SetFigures.as_json`.
    """
    record = {"evaluator": evaluator.as_json(), "training": training, "sets": sets}
    write_whole(path, json.dumps(record, indent=2) + "\n")
    return record
