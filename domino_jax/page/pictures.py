"""Charts drawn by matplotlib, once: as SVG for the page, as PNG for wherever else it is shown.

The SVG stands in the page itself and takes its colours and letters from there, so one drawing
serves light and dark. It is as wide as a phone, and so its words are read on one without zooming:

    fill: #1c1c1a    ->    fill: var(--ink)    what the page's style says, light or dark
"""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from domino_jax.base.errors import InputError
from domino_jax.base.escapes import printable
from domino_jax.page.charts import PARTS, Chart, described

WIDTH, HEIGHT = 3.6, 2.3  # inches; a phone's width at 100 units an inch
ROW = 0.24  # inches of a line of dots or of a bar
DPI = 200
LABEL = 18  # characters beside a line of dots
SMALL, NORMAL = 8.0, 9.0  # points

# Colours of the light page by the names that its style has for them.
INK, MUTED, RULE = "#1c1c1a", "#5b5b55", "#dddcd5"
RUNS = ("#1f5fa8", "#b4491a", "#1e7a4f", "#7b3f98", "#866200", "#a8326e", "#0f7080", "#595959")
PART_COLOURS = ("#2f6db3", "#c2622f", "#9aa0a6", "#c9c7be")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
GLYPHS = "●■▲◆▼✚✖★"  # the same marks as letters
STYLE = (
    {INK: "ink", MUTED: "muted", RULE: "rule"}
    | {colour: f"run-{index}" for index, colour in enumerate(RUNS)}
    | {colour: f"part-{index}" for index, colour in enumerate(PART_COLOURS)}
)


@dataclass(frozen=True)
class Key:
    """An entry of a legend: the name and the letter of a colour, and whose it is."""

    style: str
    glyph: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A drawn chart.

    Attributes:
        chart: what it shows.
        keys: its legend; of one run it needs none.
        alt: it in words.
        box: the `viewBox` of its SVG.
        body: what stands in its SVG element; HTML.
        png: the same drawing, light, its title above.
    """

    chart: Chart
    keys: list[Key]
    alt: str
    box: str
    body: str
    png: bytes


def drawn(charts: Sequence[Chart], names: Sequence[str]) -> list[Picture]:
    """Draws charts of runs with these names.

    Raises:
        InputError: matplotlib is not installed.
    """
    # Imported where it is used: machines with an accelerator's packages alone often lack it.
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise InputError("domino report needs matplotlib: pip install matplotlib") from error
    except ValueError as error:  # an unknown backend
        raise InputError(f"MPLBACKEND: {error}; unset it") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # matplotlib's own font: the same widths on every machine.
        matplotlib.rc("font", family="DejaVu Sans", size=NORMAL)
        matplotlib.rc("text", color=INK, parse_math=False)  # a run may be called $1
        matplotlib.rc("svg", fonttype="none", hashsalt="domino")  # the same bytes each time
        matplotlib.rc("axes", edgecolor=RULE, labelcolor=MUTED, titlesize=NORMAL, labelsize=SMALL)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("grid", color=RULE, linewidth=0.6)
        for ticks in ("xtick", "ytick"):
            matplotlib.rc(ticks, color=RULE, labelcolor=MUTED, labelsize=SMALL)
        # Of letters that its font lacks; on the page the reader's own fonts have them.
        warnings.simplefilter("ignore")
        return [_drawn(chart, names) for chart in charts]


def _drawn(chart: Chart, names: Sequence[str]) -> Picture:
    from matplotlib.figure import Figure

    rows = [*(dot.label for dot in chart.dots), *(bar.label for bar in chart.bars)]
    height = max(0.75 + len(rows) * ROW, 1.0) if rows else HEIGHT
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    draw = _curves if chart.lines else _dots if chart.dots else _bars
    draw(axes, chart)
    if rows:  # the first one on top
        axes.set_yticks(range(len(rows)), [_short(label, LABEL) for label in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    axes.set_xlabel(chart.x)
    vector, raster = io.StringIO(), io.BytesIO()
    figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
    # In a file by itself nothing beside it says what it shows, and whose lines they are.
    axes.set_title(_short(chart.title, 60), loc="left")
    called = _called(chart, names)
    if chart.lines and called:
        _legend(axes, called)
    figure.savefig(raster, format="png", dpi=DPI, facecolor="white")
    box, body = _inline(vector.getvalue())
    keys = [run_key(run, name) for run, name in called.items()]
    if chart.bars:
        keys = [Key(f"part-{place}", "■", name) for place, name in enumerate(PARTS)]
    alt = described(chart, names)
    return Picture(chart=chart, keys=keys, alt=alt, box=box, body=body, png=raster.getvalue())


def _curves(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullLocator, PercentFormatter

    for line in chart.lines:
        colour, mark = RUNS[line.run % len(RUNS)], MARKS[line.run % len(MARKS)]
        xs, ys = zip(*line.points, strict=True)
        # Marks tell colours apart for who cannot, and few points from a line.
        every = max(len(xs) // 6, 1)
        axes.plot(
            xs,
            ys,
            color=colour,
            linestyle="--" if line.dashed else "-",
            linewidth=1.3,
            marker=mark,
            markersize=3.4,
            markevery=(every - 1, every),
        )
        if line.intervals:
            low, high = zip(*line.intervals, strict=True)
            axes.vlines(xs, low, high, color=colour, linewidth=1.3)
    axes.grid(axis="y")
    if chart.logarithmic:
        axes.set_xscale("log")
        places = sorted({x for line in chart.lines for x, _ in line.points})
        named = EngFormatter(sep="")
        axes.set_xticks(places, [named(float(f"{place:.2g}")) for place in places])
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(bottom=0)


def _dots(axes: Any, chart: Chart) -> None:
    rows = range(len(chart.dots))
    for row, dot in zip(rows, chart.dots, strict=True):
        colour, mark = RUNS[dot.run % len(RUNS)], MARKS[dot.run % len(MARKS)]
        # Full for the draft itself, hollow for what it is compared with.
        own = row == 0 or chart.dots[row - 1].run != dot.run
        axes.hlines(row, dot.low, dot.high, color=colour, linewidth=1.6)
        axes.plot(
            dot.value,
            row,
            marker=mark,
            color=colour,
            markersize=5,
            markerfacecolor=colour if own else "none",
        )
    for run, bound in chart.bounds.items():
        its = [row for row in rows if chart.dots[row].run == run]
        ends = (its[0] - 0.4, its[-1] + 0.4)
        axes.vlines(bound, *ends, color=RUNS[run % len(RUNS)], linestyle="--", linewidth=1.3)


def _bars(axes: Any, chart: Chart) -> None:
    for row, bar in enumerate(chart.bars):
        left = 0.0
        for colour, part in zip(PART_COLOURS, bar.parts, strict=True):
            axes.barh(row, part, left=left, height=0.6, color=colour)
            left += part
        if bar.mark is not None:
            axes.vlines(bar.mark, row - 0.42, row + 0.42, color=INK, linewidth=1.6)
    axes.set_axisbelow(True)


def run_key(run: int, name: str) -> Key:
    """How a run is marked wherever it is named."""
    return Key(f"run-{run % len(RUNS)}", GLYPHS[run % len(GLYPHS)], name)


def _called(chart: Chart, names: Sequence[str]) -> Mapping[int, str]:
    """What the colours of lines or dots stand for, by their runs; of one run it goes unsaid."""
    if len(names) == 1:
        return {}
    shown = {*(line.run for line in chart.lines), *(dot.run for dot in chart.dots)}
    return chart.kinds or {run: names[run] for run in sorted(shown)}


def _legend(axes: Any, called: Mapping[int, str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for run, name in called.items():
        colour, mark = RUNS[run % len(RUNS)], MARKS[run % len(MARKS)]
        label = _short(name, LABEL)
        handles.append(Line2D([], [], color=colour, marker=mark, markersize=3.4, label=label))
    axes.legend(handles=handles, frameon=False, fontsize=SMALL)


def _short(text: str, characters: int) -> str:
    text = printable(text)  # halves of characters, which JSON may hold, end in an error
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _inline(svg: str) -> tuple[str, str]:
    """The `viewBox` and the body of an SVG of matplotlib, its colours and letters the page's."""
    found = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', svg, flags=re.DOTALL)
    assert found is not None, "matplotlib writes other SVG than it did"
    body = re.sub(r"<metadata>.*?</metadata>", "", found[2], count=1, flags=re.DOTALL)
    for colour, name in STYLE.items():
        # In properties alone: a run's name may look like a colour.
        body = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{name})", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    # Names of groups: several drawings on a page would have the same.
    return found[1], re.sub(r'<g id="[^"]*"', "<g", body)
