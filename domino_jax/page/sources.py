"""Every figure of a page stands in a file of a run, so it is carried with its place there.

What somebody edited may be anything, and a page of what is left is worth more than a traceback. So
no tree of a file is indexed itself: a `Source` answers, with None where something is not there or
is something else.

    run.evaluation["sets"]["everyday"]["prompts"]    80, in demo/evaluation.json at
                                                   /sets/everyday/prompts
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError
from domino_jax.base.files import OWN_HASH, read_json, read_own_json, read_text
from domino_jax.base.parse import YAML_CHARACTERS, parse_yaml
from domino_jax.evaluation.record import EVALUATION, REMEDY
from domino_jax.training.log import METRICS, TIMING, log_notice, read_metrics, read_timing

CONFIG = "config.yaml"
# Any one of them makes a directory a run: a copy for a colleague may lack the checkpoints.
SIGNS = ("checkpoints", CONFIG, METRICS, EVALUATION)

LARGEST = 1e30  # nothing that was measured; sums of larger ones leave what axes can hold


@dataclass(frozen=True)
class Source:
    """A place in a file of a run and what stands there; None where nothing does.

    Attributes:
        file: the run's name and the file's in it. The lines of a log count as one list, from 0.
        path: the keys and indices that lead there.
        value: what was read.
    """

    file: str
    path: tuple[str | int, ...]
    value: Any

    def __getitem__(self, key: str | int) -> "Source":
        found = None
        if isinstance(self.value, dict):
            found = self.value.get(key)
        elif isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            found = self.value[key]
        return Source(self.file, (*self.path, key), found)

    @property
    def number(self) -> float | None:
        """A number of at most `LARGEST`, None for everything else."""
        # To `isinstance` true is a number.
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            return None
        return self.value if abs(self.value) <= LARGEST else None  # false of NaN

    @property
    def text(self) -> str | None:
        """Text that is not empty, None for everything else."""
        return self.value if isinstance(self.value, str) and self.value else None

    @property
    def entries(self) -> list["Source"]:
        """What a list holds; nothing where it is none."""
        count = len(self.value) if isinstance(self.value, list) else 0
        return [self[index] for index in range(count)]

    @property
    def names(self) -> list[str]:
        """The keys of a mapping, in the file's order; none where it is none."""
        keys = self.value if isinstance(self.value, dict) else ()
        return [key for key in keys if isinstance(key, str)]

    @property
    def pointer(self) -> str:
        """The place as a JSON pointer (RFC 6901)."""
        steps = (str(step).replace("~", "~0").replace("/", "~1") for step in self.path)
        return "".join(f"/{step}" for step in steps)


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run hold; the value of a file that is not there is None.

    Attributes:
        name: what a page calls it.
        config_text: `config.yaml` as it stands.
        config, metrics, timing, evaluation: the files; logs as lists of their records.
        notices: a line for each file whose figures could not be verified.
    """

    name: str
    config_text: str | None
    config: Source
    metrics: Source
    timing: Source
    evaluation: Source
    notices: Sequence[str] = ()

    @functools.cached_property
    def _by_split(self) -> dict[str, list[Source]]:
        # Once: a log of a long run is asked about for every curve.
        found: dict[str, list[Source]] = {}
        for record in self.metrics.entries:
            found.setdefault(record["split"].text or "", []).append(record)
        return found

    def records(self, split: str) -> list[Source]:
        """The records of one kind in `metrics.jsonl`."""
        return self._by_split.get(split, [])

    @property
    def sets(self) -> dict[str, Source]:
        """The evaluated prompt sets by name."""
        every = self.evaluation["sets"]
        return {name: every[name] for name in every.names if every[name]["ways"].names}

    def way(self, prompts: str, kind: str) -> Source:
        """The figures of a way to decode on a set of prompts."""
        return self.evaluation["sets"][prompts]["ways"][kind]

    @property
    def answer_tokens(self) -> Source:
        """Supervised tokens of the data that the run was trained on."""
        return self.evaluation["training"]["data"]["answer_tokens"]

    @property
    def head(self) -> str | None:
        """The name of the draft's head; None for plain DFlash, and where nothing says."""
        evaluated = self.evaluation["evaluator"]["head"].text
        return evaluated or self.config["draft"]["projector_type"].text


def last(records: Sequence[Source]) -> Source:
    """The last record; nothing where there is none."""
    return records[-1] if records else Source("", (), None)


def set_names(runs: Sequence[RunFiles]) -> list[str]:
    """The sets of prompts of all runs, each once, in the order in which they come."""
    return list(dict.fromkeys(name for run in runs for name in run.sets))


def ends(way: Source, tau: float) -> tuple[float, float]:
    """The interval of a way to decode; the tau itself where there is none, as of one prompt."""
    low, high = way["interval"][0].number, way["interval"][1].number
    return (tau, tau) if low is None or high is None else (low, high)


def read_runs(directories: Sequence[Path]) -> list[RunFiles]:
    """Reads the files of runs.

    Raises:
        InputError: a directory is no run, or one of its files is damaged or was changed.
    """
    names = [directory.resolve().name or str(directory) for directory in directories]
    # Runs of two experiments are often called alike; then only their paths tell them apart.
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    return [_read(place, name) for place, name in zip(directories, names, strict=True)]


def _read(directory: Path, name: str) -> RunFiles:
    if not any((directory / sign).exists() for sign in SIGNS):
        raise InputError(
            f"{directory}: not a run directory (none of {', '.join(SIGNS)} in it); "
            "give the run_dir of a training"
        )
    text = config = evaluation = None
    notices = [log_notice(directory)]
    if (directory / CONFIG).exists():
        text = read_text(directory / CONFIG, limit=YAML_CHARACTERS)
        config = parse_yaml(text, source=str(directory / CONFIG))
    if (directory / EVALUATION).exists():
        evaluation = read_json(directory / EVALUATION)
        if OWN_HASH in evaluation:
            evaluation = read_own_json(directory / EVALUATION, remedy=REMEDY)
        else:
            notices.append(
                f"{EVALUATION}: no sha256, as earlier versions wrote it: its figures are not "
                f"verified; {REMEDY}"
            )
        # Of the log at the time of the evaluation.
        notices.append(Source("", (), evaluation)["training"]["notice"].text)
    return RunFiles(
        name,
        text,
        Source(f"{name}/{CONFIG}", (), config),
        Source(f"{name}/{METRICS}", (), read_metrics(directory)),
        Source(f"{name}/{TIMING}", (), list(read_timing(directory))),
        Source(f"{name}/{EVALUATION}", (), evaluation),
        [f"{name}/{notice}" for notice in dict.fromkeys(notices) if notice is not None],
    )
