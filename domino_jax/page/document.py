"""The page of a run or several, written: HTML that needs no network and no script.

report.html       all of it, drawings included: it can be mailed
report/tau-1.png  each drawing by itself, for slides and other pages
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from domino_jax import __version__
from domino_jax.base.errors import InputError
from domino_jax.base.escapes import printable_text
from domino_jax.base.files import whole_file, write_whole
from domino_jax.page import charts, notes, tables
from domino_jax.page.cells import Cell
from domino_jax.page.notes import Answer, left_out
from domino_jax.page.pictures import Picture, drawn, run_key
from domino_jax.page.sources import RunFiles, set_names
from domino_jax.page.tables import Table, side_by_side
from domino_jax.page.verdict import verdicts

ONE_KIND = "needs runs of one kind, with a head or without, that differ in answer tokens"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        key, title: of its element and its heading.
        tables: by caption.
        warnings: of each run that has some, by its place.
        lacking: what is not there, and why.
    """

    key: str
    title: str
    pictures: Sequence[Picture] = ()
    tables: Mapping[str, Table] = field(default_factory=dict)
    warnings: Mapping[int, Sequence[Cell]] = field(default_factory=dict)
    answers: Sequence[Answer] = ()
    lacking: Sequence[str] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show but why."""
        shown = self.pictures or any(self.tables.values()) or self.warnings or self.answers
        return bool(self.lacking) and not shown


def write_page(runs: Sequence[RunFiles], out: Path) -> None:
    """Writes the page of runs, and its drawings into the folder of the same name beside it.

    Args:
        runs: compared with each other, in this order.
        out: the file, `NAME.html`; the drawings go to `NAME/`.
    Raises:
        InputError: matplotlib is not installed, or the folder is a link.
        OSError: something could not be written.
    """
    parts = [*_evaluated(runs), *_trained(runs)]
    text = _rendered(runs, parts, out.stem)
    folder = out.with_suffix("")
    if folder.is_symlink():
        raise InputError(f"{folder}: a symbolic link, expected a directory; remove the link")
    folder.mkdir(exist_ok=True)
    for picture in (picture for part in parts for picture in part.pictures):
        with whole_file(folder / f"{picture.chart.name}.png") as file:
            file.write(picture.png)
    # Last: what it links to is there by then. JSON may hold halves of characters, UTF-8 may not.
    write_whole(out, text.encode("utf-8", "replace").decode("utf-8"))


def _evaluated(runs: Sequence[RunFiles]) -> list[Section]:
    """What decoding measured."""
    names, sets = [run.name for run in runs], set_names(runs)
    unevaluated = left_out(runs, "evaluation")
    curves = drawn(charts.data_charts(runs), names)
    parts = [
        Section(
            "tau",
            "Tau",
            pictures=drawn(charts.tau_charts(runs), names),
            tables={
                name: side_by_side(tables.tau_column(run, name, runs[0]) for run in runs)
                for name in sets
            },
            lacking=unevaluated,
        ),
        Section(
            "position",
            "Acceptance by position",
            pictures=drawn(charts.position_charts(runs), names),
            tables={name: tables.position_table(runs, name) for name in sets},
            lacking=unevaluated,
        ),
        Section(
            "cycle",
            "Time of a cycle",
            pictures=drawn(charts.cycle_charts(runs), names),
            tables={"A cycle at batch 1, medians": side_by_side(map(tables.cycle_column, runs))},
            lacking=left_out(runs, "cycle"),
        ),
        Section(
            "data",
            "Tau by data",
            pictures=curves,
            tables={"Tau by answer tokens trained on": tables.data_table(runs)} if curves else {},
            lacking=() if curves else (ONE_KIND,),
        ),
    ]
    # Of a single run there is no curve, and nothing is lacking.
    return parts if len(runs) > 1 else parts[:-1]


def _trained(runs: Sequence[RunFiles]) -> list[Section]:
    """What training measured, and what is no figure."""
    names = [run.name for run in runs]
    warnings = {place: lines for place, run in enumerate(runs) if (lines := notes.warnings(run))}
    unaccepted = [*left_out(runs, "heldout"), *left_out(runs, "rollout")]
    return [
        Section(
            "training",
            "Training",
            pictures=drawn(charts.training_charts(runs), names),
            tables={
                "What was trained, and on what": side_by_side(map(tables.training_column, runs))
            },
            lacking=left_out(runs, "training"),
        ),
        Section(
            "acceptance",
            "Acceptance while training",
            pictures=drawn(charts.acceptance_charts(runs), names),
            tables={"Last figures of training": side_by_side(map(tables.heldout_column, runs))},
            lacking=list(dict.fromkeys(unaccepted)),
        ),
        Section(
            "speed",
            "Speed and memory of training",
            tables={
                "Training, by the last line of timing.jsonl": side_by_side(
                    map(tables.speed_column, runs)
                )
            },
            lacking=left_out(runs, "timing"),
        ),
        Section("warnings", "Warnings", warnings=warnings, lacking=left_out(runs, "warnings")),
        Section(
            "answers", "Answers", answers=notes.answers(runs), lacking=left_out(runs, "answers")
        ),
        Section(
            "evaluator",
            "How it was measured",
            tables={"How it was evaluated": side_by_side(map(tables.evaluator_column, runs))},
            lacking=left_out(runs, "evaluation"),
        ),
    ]


def _rendered(runs: Sequence[RunFiles], parts: Sequence[Section], folder: str) -> str:
    absent: dict[str, list[str]] = {}  # titles of empty sections by the reason
    for part in parts:
        for why in part.lacking if part.empty else ():
            absent.setdefault(why, []).append(part.title)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Not of `Markup`: paths of drawings, and text that is escaped already.
        finalize=lambda value: printable_text(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        runs=runs,
        keys=[run_key(place, run.name) for place, run in enumerate(runs)],
        summaries=[tables.summary(run) for run in runs],
        verdicts=verdicts(runs),
        unevaluated=left_out(runs, "evaluation"),
        sections=[part for part in parts if not part.empty],
        absent=absent,
        folder=folder,
        version=__version__,
    )
