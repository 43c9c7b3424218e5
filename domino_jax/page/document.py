"""The page of a run or several, written: HTML that needs no network and no script.

report.html       all of it, drawings included: it can be mailed
report/tau-1.png  each drawing by itself, for slides and other pages
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from domino_jax import __version__
from domino_jax.base.files import whole_file, write_whole
from domino_jax.page import charts, notes, tables
from domino_jax.page.cells import is_missing
from domino_jax.page.notes import Answer, Warnings, left_out
from domino_jax.page.pictures import Picture, drawn, run_key
from domino_jax.page.sources import RunFiles
from domino_jax.page.tables import Table
from domino_jax.page.verdict import verdicts

COUNTING = (
    "Tau is committed tokens over verifications. An answer's first token is the target's own, "
    "costs no verification and is not counted; a verification commits the drafted tokens that the "
    "target agrees with and one of the target's own, cut where the answer stops or reaches its "
    "limit."
)
FORCED = (
    "Two figures that are not the same: the acceptance length is teacher-forced, each block sees "
    "the row's own tokens before it; tau is rolled out, what decoding really commits."
)
FLOOR = (
    "The n-gram floor is prompt look-up: what followed the same tokens before is proposed, no "
    "model drafts. Intervals hold 95 %, over prompts; gains are paired by prompt."
)
SHARES = (
    "Conditional: the share that was kept of the drafted tokens at a position that all before it "
    "had led to. Marginal: the share of all cycles that kept so many."
)
BREAK_EVEN = (
    "The break-even tau is the time of a cycle over that of one step of the target alone, both at "
    "batch 1 on the machine named below: above it drafting is faster there."
)


QUIET = "None: no skipped step, no spike, no difference from the target's own output but ties."


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page; `lacking` says what is not there, and why."""

    key: str
    title: str
    lead: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    warnings: tuple[Warnings, ...] = ()
    answers: tuple[Answer, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show but why."""
        rows = any(table.rows for table in self.tables)
        return bool(self.lacking) and not (self.pictures or rows or self.warnings or self.answers)


def write_page(runs: Sequence[RunFiles], out: Path) -> None:
    """Writes the page of runs, and its drawings into the folder of the same name beside it.

    Args:
        runs: compared with each other, in this order.
        out: the file, `NAME.html`; the drawings go to `NAME/`.
    Raises:
        InputError: matplotlib is not installed.
        OSError: something could not be written.
    """
    parts = [*_evaluated(runs), *_trained(runs), *_told(runs)]
    text = _rendered(runs, parts, out.stem)
    folder = out.with_suffix("")
    folder.mkdir(exist_ok=True)
    for picture in (picture for part in parts for picture in part.pictures):
        with whole_file(folder / f"{picture.name}.png") as file:
            file.write(picture.png)
    # Last: what it links to is there by then. JSON may hold halves of characters, UTF-8 may not.
    write_whole(out, text.encode("utf-8", "replace").decode("utf-8"))


def _evaluated(runs: Sequence[RunFiles]) -> list[Section]:
    """What decoding measured."""
    names = [run.name for run in runs]
    unevaluated = left_out(runs, notes.no_evaluation)
    parts = [
        Section(
            key="tau",
            title="Tau",
            lead=(COUNTING, FLOOR),
            pictures=drawn(charts.tau_charts(runs), names),
            tables=tables.tau_tables(runs),
            lacking=unevaluated,
        ),
        Section(
            key="position",
            title="Acceptance by position",
            lead=(SHARES,),
            pictures=drawn(charts.position_charts(runs), names),
            tables=tables.position_tables(runs),
            lacking=unevaluated,
        ),
        Section(
            key="cycle",
            title="Time of a cycle",
            lead=(BREAK_EVEN,),
            pictures=drawn(charts.cycle_charts(runs), names),
            tables=(tables.cycle_table(runs),),
            lacking=left_out(runs, notes.no_cycle),
        ),
    ]
    curves = drawn(charts.data_charts(runs), names)
    # Of a single run there is no curve, and nothing is lacking.
    if len(runs) > 1:
        told = "needs runs of one kind, with a head or without, that differ in answer tokens"
        data = Section(
            key="data",
            title="Tau by data",
            pictures=curves,
            tables=(tables.data_table(runs),) if curves else (),
            lacking=() if curves else (told,),
        )
        parts.append(data)
    return parts


def _trained(runs: Sequence[RunFiles]) -> list[Section]:
    """What training measured."""
    names = [run.name for run in runs]
    lacking = (*left_out(runs, notes.no_heldout), *left_out(runs, notes.no_rollout))
    return [
        Section(
            key="training",
            title="Training",
            pictures=drawn(charts.training_charts(runs), names),
            tables=(tables.training_table(runs),),
            lacking=left_out(runs, notes.no_log),
        ),
        Section(
            key="acceptance",
            title="Acceptance while training",
            lead=(FORCED,),
            pictures=drawn(charts.acceptance_charts(runs), names),
            tables=(tables.heldout_table(runs),),
            lacking=tuple(dict.fromkeys(lacking)),
        ),
        Section(
            key="speed",
            title="Speed and memory of training",
            tables=(tables.speed_table(runs),),
            lacking=left_out(runs, notes.no_timing),
        ),
    ]


def _told(runs: Sequence[RunFiles]) -> list[Section]:
    """What is no figure."""
    warnings = notes.warnings(runs)
    return [
        Section(
            key="warnings",
            title="Warnings",
            warnings=warnings,
            lead=() if warnings else (QUIET,),
            lacking=left_out(runs, notes.no_warnings),
        ),
        Section(
            key="answers",
            title="Answers",
            answers=notes.answers(runs),
            lacking=left_out(runs, notes.no_answers),
        ),
        Section(
            key="evaluator",
            title="How it was measured",
            tables=(tables.evaluator_table(runs),),
            lacking=left_out(runs, notes.no_evaluation),
        ),
    ]


def _absent(parts: Sequence[Section]) -> dict[str, list[str]]:
    """The titles of the empty sections by the reason."""
    titles: dict[str, list[str]] = {}
    for part in parts:
        for why in part.lacking if part.empty else ():
            titles.setdefault(why, []).append(part.title)
    return titles


def _rendered(runs: Sequence[RunFiles], parts: Sequence[Section], folder: str) -> str:
    keys = [run_key(place, run.name) for place, run in enumerate(runs)]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    summaries = [(key, tables.summary(run)) for key, run in zip(keys, runs, strict=True)]
    return environment.get_template("page.html").render(
        runs=runs,
        sections=[part for part in parts if not part.empty],
        absent=_absent(parts),
        summaries=[pair for pair in summaries if not is_missing(pair[1])],
        verdicts=verdicts(runs),
        unevaluated=left_out(runs, notes.no_evaluation),
        folder=folder,
        version=__version__,
        keys=keys,
    )
