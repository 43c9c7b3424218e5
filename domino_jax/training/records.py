"""Records of a checkpoint besides its arrays: the draft for its readers, the run to resume it.

In step 40 for example:

    40/draft/metadata   DraftRecord and its step, JSON
    40/run/metadata     RunRecord, JSON
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError, scalars
from domino_jax.base.files import read_json
from domino_jax.config.model import DraftConfig, draft_from_dict, draft_tree
from domino_jax.data.template import KWARGS, ChatTemplate
from domino_jax.training.checkpoint_names import DRAFT, METADATA, RUN
from domino_jax.training.log import LogMark

OTHER_VERSION = (
    "the run was started by another version of this program and cannot be resumed by this one; "
    "use another run_dir, which may begin with the old run's export (draft.init_from)"
)


@dataclass(frozen=True)
class DraftRecord:
    """A draft, the built-in name or directory of its target, and the template of its rows.

    `target_sha256` and `tokenizer_sha256` are fingerprints (`target.fingerprint`), the first None
    until it is computed, never in a checkpoint.
    """

    config: DraftConfig
    target: str
    chat_template: ChatTemplate
    target_sha256: str | None
    tokenizer_sha256: str

    def as_json(self, *, step: int) -> dict[str, Any]:
        """As the checkpoint of a step stores it."""
        return {
            "step": step,
            "config": draft_tree(self.config),
            "target": self.target,
            "target_sha256": self.target_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            **self.chat_template.as_json(),
        }


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is resumed with besides its state.

    Attributes:
        config: the run's configuration, as plain values.
        inputs: what was read, by name -> a few words with its hash.
        outcomes: of the steps that no line of the log tells yet (`MetricAccumulator`).
        watch: the consecutive non-finite steps up to then (`StepWatch`).
        log: where `metrics.jsonl` stood.
        heldout_due: whether the held-out pass of this step was still to come.
        rollout_due: whether its rollout was.
    """

    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    outcomes: Sequence[Mapping[str, Any]]
    watch: Mapping[str, Any]
    log: LogMark
    heldout_due: bool
    rollout_due: bool

    def as_json(self) -> dict[str, Any]:
        """As a checkpoint stores it."""
        return vars(self) | {"log": vars(self.log)}


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run is resumed from; `source` is its directory."""

    step: int
    source: Path
    record: RunRecord


def read_run_record(source: Path) -> RunRecord:
    """What the run of an undamaged checkpoint, a directory, is resumed with.

    Raises:
        InputError: it holds an imported draft, or another version saved it.
    """
    # First: an imported draft has no record either, and is not of another version.
    if not (source / "optimizer").is_dir():
        raise InputError(
            f"{source}: an imported draft without optimiser state cannot be continued; "
            "give its checkpoint as draft.init_from of another run_dir"
        )
    try:
        tree = read_json(source / RUN / METADATA)
        return RunRecord(**{**tree, "log": LogMark(**tree["log"])})
    except (InputError, KeyError, TypeError) as error:
        raise InputError(f"{source}: {OTHER_VERSION}") from error


def recorded_step(source: Path) -> int | None:
    """The step that an undamaged checkpoint, a directory, was saved at.

    None for a checkpoint of an earlier version, whose record has no step.

    Raises:
        InputError: the record cannot be read, or its step is no integer.
    """
    path = source / DRAFT / METADATA
    step = read_json(path).get("step")
    if step is not None and type(step) is not int:  # to `isinstance` true is an integer
        raise InputError(f"{path}: step is {step!r}, expected an integer")
    return step


def read_draft_record(source: Path) -> DraftRecord:
    """What an undamaged checkpoint, a directory, says of its draft.

    Raises:
        InputError: it was written by hand, or by another version.
    """
    stored = read_json(source / DRAFT / METADATA)
    try:
        config = draft_from_dict(stored["config"], source=f"{source}/draft")
        kwargs = scalars(stored[KWARGS], source=f"{source}/draft: {KWARGS}")
        template = ChatTemplate(stored["chat_template"], kwargs)
        hashes = (stored[name] for name in ("target_sha256", "tokenizer_sha256"))
        return DraftRecord(config, stored["target"], template, *hashes)
    except KeyError as error:
        raise InputError(f"{source}/draft: {error} is missing") from error
