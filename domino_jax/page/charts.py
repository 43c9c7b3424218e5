"""What is drawn of runs, as numbers: taken from their files here, drawn in `pictures`.

A chart knows nothing of colours and sizes, and a picture nothing of runs:

    lines    over steps, positions or tokens       one for each run, base logits dashed
    dots     a tau and its interval on each row    drafted, head off, n-gram floor
    bars     milliseconds of a cycle, by part      one for each run
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from domino_jax.page.growth import FACTOR, Point, growths
from domino_jax.page.sources import RunFiles, ends, set_names

POINTS = 400  # of a line: more than a picture has columns
HEAD_OR_NOT = "full: with the head; dashed: the backbone alone"
PARTS = ("draft", "head", "verification", "rest")  # of a cycle
WAYS = {"serving": "", "head_off": "head off", "ngram": "n-gram floor"}


@dataclass(frozen=True)
class Line:
    """A line of a run; `run` is its place among those of the page."""

    run: int
    points: tuple[Point, ...]
    dashed: bool = False
    # At each point, low and high: a line of few points that were measured with an interval.
    intervals: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Dot:
    """A figure with its interval."""

    run: int
    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """The `PARTS` of a whole, and what it is compared with, if that was measured."""

    label: str
    parts: Sequence[float]
    mark: float | None


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one axis, or a row for each dot or bar.

    Attributes:
        name: of its file.
        title: what is on the y axis, or in the rows.
        x: what is on the x axis.
        about: what lines and marks are.
        lines, dots, bars: one of the three.
        bounds: break-even taus by run, beside dots.
        kinds: what lines are called that stand for several runs, by the run in whose colour.
        percent: y are shares.
        logarithmic: x is, its marks are at the points.
    """

    name: str
    title: str
    x: str
    about: str = ""
    lines: Sequence[Line] = ()
    dots: Sequence[Dot] = ()
    bars: Sequence[Bar] = ()
    bounds: Mapping[int, float] = field(default_factory=dict)
    kinds: Mapping[int, str] = field(default_factory=dict)
    percent: bool = False
    logarithmic: bool = False


def training_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Losses and what is scheduled, over the steps."""
    headed = any(run.records("train") and run.head is not None for run in runs)
    about = HEAD_OR_NOT if headed else ""
    loss = _pairs(runs, "train", ("final_loss", "base_loss"), "loss")
    heldout = _pairs(runs, "heldout", ("final_loss", "base_loss"), "loss")
    lambda_base = _lines(runs, "train", "lambda_base")
    learning_rate = _lines(runs, "train", "learning_rate")
    return [
        *_over_steps("loss", "training loss", loss, about),
        *_over_steps("heldout-loss", "held-out loss", heldout, about),
        *_over_steps("lambda-base", "weight of the base loss (lambda_base)", lambda_base),
        *_over_steps("learning-rate", "learning rate", learning_rate),
    ]


def acceptance_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """What training measured of acceptance, over the steps."""
    forced = _pairs(runs, "heldout", ("accept_len", "base_accept_len"), "accept_len")
    about = HEAD_OR_NOT if any(line.dashed for line in forced) else ""
    rolled_out = _lines(runs, "rollout", "tau")
    return [
        *_over_steps("accept-len", "acceptance length, teacher-forced", forced, about),
        *_over_steps("rollout-tau", "tau, rolled out on prompts", rolled_out),
    ]


def position_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Shares of drafted tokens that were kept, over the positions of a block."""
    charts = []
    for index, name in enumerate(set_names(runs), start=1):
        lines = []
        for place, run in enumerate(runs):
            acceptance = run.way(name, "serving")["acceptance"]
            for kind in ("conditional", "marginal"):
                shares = enumerate(acceptance[kind].entries, start=1)
                points = _points((position, share.number) for position, share in shares)
                lines += [Line(place, points, dashed=kind == "marginal")] if points else []
        if lines:
            chart = Chart(
                # Not by the set's name, which may be anything, a path for example.
                name=f"position-{index}",
                title=f"drafted tokens kept, {name}",
                x="position in the block",
                lines=lines,
                about="full: conditional; dashed: marginal",
                percent=True,
            )
            charts.append(chart)
    return charts


def tau_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Tau of each set of prompts, drafted in each way, with 95 % intervals."""
    charts = []
    for index, name in enumerate(set_names(runs), start=1):
        dots: list[Dot] = []
        bounds: dict[int, float] = {}
        for place, run in enumerate(runs):
            bound = run.evaluation["cycle"]["break_even_tau"].number
            for kind, words in WAYS.items():
                way = run.way(name, kind)
                tau = way["tau"].number
                if tau is not None:
                    dots.append(Dot(place, words or run.name, tau, *ends(way, tau)))
                    bounds |= {place: bound} if bound is not None else {}
        if dots:
            chart = Chart(
                name=f"tau-{index}",
                title=f"tau, {name}",
                x="tokens per verification",
                dots=dots,
                bounds=bounds,
                about="bars: 95 % intervals; upright dashes: the break-even",
            )
            charts.append(chart)
    return charts


def cycle_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """The time of a cycle by part."""
    bars = []
    for run in runs:
        cycle = run.evaluation["cycle"]
        parts = [cycle[part].number or 0.0 for part in PARTS]
        if any(part > 0 for part in parts):
            bars.append(Bar(run.name, parts, cycle["plain"].number))
    chart = Chart(
        name="cycle",
        title="time of a cycle",
        x="milliseconds",
        bars=bars,
        about="upright line: one step of the target alone",
    )
    return [chart] if bars else []


def data_charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """Tau over the answer tokens trained on, a line for each kind of draft, and how it goes on."""
    charts = []
    for index, name in enumerate(set_names(runs), start=1):
        found = growths(runs, name)
        # In the colour of the first run of its kind.
        measured = [Line(one.runs[0], one.points, intervals=one.intervals) for one in found]
        beyond = [Line(one.runs[0], one.beyond, dashed=True) for one in found]
        if found:
            chart = Chart(
                name=f"data-{index}",
                title=f"tau by data, {name}",
                x="answer tokens trained on",
                lines=[*measured, *beyond],
                kinds={one.runs[0]: one.kind for one in found},
                about=f"bars: 95 % intervals; dashed: extrapolated to {FACTOR} times the most",
                logarithmic=True,
            )
            charts.append(chart)
    return charts


def described(chart: Chart, names: Sequence[str]) -> str:
    """A chart for who does not see it: where each line begins and ends, or every figure."""
    told = []
    called = dict(enumerate(names)) | dict(chart.kinds)
    for line in chart.lines:
        (x, y), (last_x, last_y) = line.points[0], line.points[-1]
        dashed = ", dashed" if line.dashed else ""
        span = f"{y:.4g} at {x:.6g} to {last_y:.4g} at {last_x:.6g}"
        told.append(f"{called[line.run]}{dashed}: {span}")
    for dot in chart.dots:
        whose = dot.label if dot.label == names[dot.run] else f"{names[dot.run]}, {dot.label}"
        told.append(f"{whose}: {dot.value:.2f} ({dot.low:.2f} to {dot.high:.2f})")
    told += [f"break-even of {names[run]}: {bound:.2f}" for run, bound in chart.bounds.items()]
    for bar in chart.bars:
        pairs = zip(PARTS, bar.parts, strict=True)
        told.append(f"{bar.label}: " + ", ".join(f"{name} {ms:.1f}" for name, ms in pairs))
    return f"{chart.title} by {chart.x}. {'; '.join(told)}."


def _over_steps(name: str, title: str, lines: Sequence[Line], about: str = "") -> list[Chart]:
    """The chart of lines; none where there are no lines."""
    return [Chart(name=name, title=title, x="step", lines=lines, about=about)] if lines else []


def _pairs(
    runs: Sequence[RunFiles], split: str, keys: tuple[str, str], otherwise: str
) -> list[Line]:
    """With the head full and without it dashed; `otherwise` where there is no head."""
    with_head, base = (_lines(runs, split, key) for key in keys)
    headed = {line.run for line in with_head}
    others = [line for line in _lines(runs, split, otherwise) if line.run not in headed]
    return [*with_head, *others, *(replace(line, dashed=True) for line in base)]


def _lines(runs: Sequence[RunFiles], split: str, key: str) -> list[Line]:
    """The line of each run that has such records."""
    lines = []
    for place, run in enumerate(runs):
        records = run.records(split)
        points = _points((record["step"].number, record[key].number) for record in records)
        every = -(-len(points) // POINTS)
        # So many points as a picture can show, the last among them.
        lines += [Line(place, points[::-1][::every][::-1])] if points else []
    return lines


def _points(pairs: Iterable[tuple[float | None, float | None]]) -> tuple[Point, ...]:
    return tuple((float(x), float(y)) for x, y in pairs if x is not None and y is not None)
