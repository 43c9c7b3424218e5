"""What is drawn of runs, as numbers: taken from their files here, drawn in `pictures`.

A chart knows nothing of colours and sizes, and a picture nothing of runs:

    Curves    lines over steps, positions or tokens     one for each run, base logits dashed
    Dots      a tau and its interval on each line       drafted, head off, n-gram floor
    Bars      milliseconds of a cycle, part by part     one bar for each run
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from domino_jax.page.growth import FACTOR, Point, growths
from domino_jax.page.sources import RunFiles, ends
from domino_jax.page.tables import set_names

POINTS = 400  # of a line: more than a picture has columns
PARTS = ("draft", "head", "verification", "rest")


@dataclass(frozen=True)
class Line:
    """A line of a run; `run` is its place among those of the page."""

    run: int
    points: tuple[Point, ...]
    dashed: bool = False
    # At each point, low and high: a line of few points that were measured with an interval.
    intervals: tuple[Point, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines over one axis.

    Attributes:
        name: of its file.
        title: what is on the y axis.
        x: what is on the x axis.
        lines: of all runs.
        about: what a full and a dashed line are.
        kinds: what lines are called that stand for several runs, by the run in whose colour.
        percent: y are shares.
        logarithmic: x is, its marks are at the points.
    """

    name: str
    title: str
    x: str
    lines: tuple[Line, ...]
    about: str = ""
    kinds: tuple[tuple[int, str], ...] = ()
    percent: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Dot:
    """A figure with its interval."""

    run: int
    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Dots:
    """A line of its own for each figure; `bounds` are break-even taus by run."""

    name: str
    title: str
    x: str
    dots: tuple[Dot, ...]
    bounds: tuple[tuple[int, float], ...]
    about: str = ""


@dataclass(frozen=True)
class Bar:
    """The parts of a whole, and what it is compared with, if that was measured."""

    run: int
    label: str
    parts: tuple[float, ...]
    mark: float | None


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A bar of parts for each run."""

    name: str
    title: str
    x: str
    parts: tuple[str, ...]
    bars: tuple[Bar, ...]
    about: str = ""


Chart = Curves | Dots | Bars


def training_charts(runs: Sequence[RunFiles]) -> tuple[Chart, ...]:
    """Losses and what is scheduled, over the steps."""
    base = "full: with the head; dashed: the backbone alone"
    headed = any(run.records("train") and run.head is not None for run in runs)
    about = base if headed else ""
    loss = _pairs(runs, "train", ("final_loss", "base_loss"), "loss")
    heldout = _pairs(runs, "heldout", ("final_loss", "base_loss"), "loss")
    charts = (
        Curves(name="loss", title="training loss", x="step", lines=loss, about=about),
        Curves(name="heldout-loss", title="held-out loss", x="step", lines=heldout, about=about),
        Curves(
            name="lambda-base",
            title="weight of the base loss (lambda_base)",
            x="step",
            lines=_lines(runs, "train", "lambda_base"),
        ),
        Curves(
            name="learning-rate",
            title="learning rate",
            x="step",
            lines=_lines(runs, "train", "learning_rate"),
        ),
    )
    return tuple(chart for chart in charts if chart.lines)


def acceptance_charts(runs: Sequence[RunFiles]) -> tuple[Chart, ...]:
    """What training measured of acceptance, over the steps."""
    forced = _pairs(runs, "heldout", ("accept_len", "base_accept_len"), "accept_len")
    headed = any(line.dashed for line in forced)
    charts = (
        Curves(
            name="accept-len",
            title="acceptance length, teacher-forced",
            x="step",
            lines=forced,
            about="full: with the head; dashed: the backbone alone" if headed else "",
        ),
        Curves(
            name="rollout-tau",
            title="tau, rolled out on prompts",
            x="step",
            lines=_lines(runs, "rollout", "tau"),
        ),
    )
    return tuple(chart for chart in charts if chart.lines)


def position_charts(runs: Sequence[RunFiles]) -> tuple[Chart, ...]:
    """Shares of drafted tokens that were kept, over the positions of a block."""
    charts = []
    for index, name in enumerate(set_names(runs), start=1):
        lines = []
        for place, run in enumerate(runs):
            acceptance = run.evaluation.at("sets", name, "ways", "serving", "acceptance")
            for kind in ("conditional", "marginal"):
                shares = enumerate(acceptance[kind].entries, start=1)
                points = _points((position, share.number) for position, share in shares)
                lines += [Line(place, points, dashed=kind == "marginal")] if points else []
        if lines:
            # Not by the set's name, which may be anything, a path for example.
            chart = Curves(
                name=f"position-{index}",
                title=f"drafted tokens kept, {name}",
                x="position in the block",
                lines=tuple(lines),
                about="full: conditional; dashed: marginal",
                percent=True,
            )
            charts.append(chart)
    return tuple(charts)


def tau_charts(runs: Sequence[RunFiles]) -> tuple[Chart, ...]:
    """Tau of each set of prompts, drafted in each way, with 95 % intervals."""
    kinds = {"serving": "", "head_off": "head off", "ngram": "n-gram floor"}
    charts = []
    for index, name in enumerate(set_names(runs), start=1):
        dots, bounds = [], []
        for place, run in enumerate(runs):
            for kind, words in kinds.items():
                way = run.evaluation.at("sets", name, "ways", kind)
                tau = way["tau"].number
                if tau is not None:
                    dots.append(Dot(place, words or run.name, tau, *ends(way, tau)))
            bound = run.evaluation.at("cycle", "break_even_tau").number
            bounds += [(place, bound)] if bound is not None else []
        shown = {dot.run for dot in dots}
        if dots:
            chart = Dots(
                name=f"tau-{index}",
                title=f"tau, {name}",
                x="tokens per verification",
                dots=tuple(dots),
                bounds=tuple((place, bound) for place, bound in bounds if place in shown),
                about="bars: 95 % intervals; upright dashes: the break-even",
            )
            charts.append(chart)
    return tuple(charts)


def cycle_charts(runs: Sequence[RunFiles]) -> tuple[Chart, ...]:
    """The time of a cycle by part."""
    bars = []
    for place, run in enumerate(runs):
        cycle = run.evaluation["cycle"]
        parts = tuple(cycle[part].number or 0.0 for part in PARTS)
        if any(part > 0 for part in parts):
            bars.append(Bar(place, run.name, parts, cycle["plain"].number))
    chart = Bars(
        name="cycle",
        title="time of a cycle",
        x="milliseconds",
        parts=PARTS,
        bars=tuple(bars),
        about="upright line: one step of the target alone",
    )
    return (chart,) if bars else ()


def data_charts(runs: Sequence[RunFiles]) -> tuple[Chart, ...]:
    """Tau over the answer tokens trained on, a line for each kind of draft, and how it goes on."""
    charts = []
    for index, name in enumerate(set_names(runs), start=1):
        found = growths(runs, name)
        # In the colour of the first run of its kind.
        measured = (Line(one.runs[0], one.points, intervals=one.intervals) for one in found)
        beyond = (Line(one.runs[0], one.beyond, dashed=True) for one in found)
        if found:
            chart = Curves(
                name=f"data-{index}",
                title=f"tau by data, {name}",
                x="answer tokens trained on",
                lines=(*measured, *beyond),
                kinds=tuple((one.runs[0], one.kind) for one in found),
                about=f"bars: 95 % intervals; dashed: extrapolated to {FACTOR} times the most",
                logarithmic=True,
            )
            charts.append(chart)
    return tuple(charts)


def described(chart: Chart, names: Sequence[str]) -> str:
    """A chart for who does not see it: where each line begins and ends, or every figure."""
    told = []
    if isinstance(chart, Curves):
        called = dict(enumerate(names)) | dict(chart.kinds)
        for line in chart.lines:
            (x, y), (last_x, last_y) = line.points[0], line.points[-1]
            dashed = ", dashed" if line.dashed else ""
            ends = f"{y:.4g} at {x:.6g} to {last_y:.4g} at {last_x:.6g}"
            told.append(f"{called[line.run]}{dashed}: {ends}")
    elif isinstance(chart, Dots):
        for dot in chart.dots:
            whose = dot.label if dot.label == names[dot.run] else f"{names[dot.run]}, {dot.label}"
            told.append(f"{whose}: {dot.value:.2f} ({dot.low:.2f} to {dot.high:.2f})")
        told += [f"break-even of {names[run]}: {bound:.2f}" for run, bound in chart.bounds]
    else:
        for bar in chart.bars:
            pairs = zip(chart.parts, bar.parts, strict=True)
            told.append(f"{bar.label}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in pairs))
    return f"{chart.title} by {chart.x}. {'; '.join(told)}."


def _pairs(
    runs: Sequence[RunFiles], split: str, keys: tuple[str, str], otherwise: str
) -> tuple[Line, ...]:
    """With the head full and without it dashed; `otherwise` where there is no head."""
    final, base = keys
    with_head = _lines(runs, split, final)
    dashed = (replace(line, dashed=True) for line in _lines(runs, split, base))
    has_final = {line.run for line in with_head}
    others = (line for line in _lines(runs, split, otherwise) if line.run not in has_final)
    return (*with_head, *others, *dashed)


def _lines(runs: Sequence[RunFiles], split: str, key: str) -> tuple[Line, ...]:
    """The line of each run that has such records."""
    lines = []
    for place, run in enumerate(runs):
        records = run.records(split)
        points = _points((record["step"].number, record[key].number) for record in records)
        lines += [Line(place, _thinned(points))] if points else []
    return tuple(lines)


def _points(pairs: Iterator[tuple[float | None, float | None]]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in pairs if x is not None and y is not None)


def _thinned(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """So many points as a picture can show, the last among them."""
    every = -(-len(points) // POINTS)
    return points[::-1][::every][::-1] if points else ()
