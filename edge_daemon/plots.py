"""The plots of ``edge-llm report``, as SVG to be put into its page. The only user of matplotlib, the extra ``report``.

They take their colours from the page, by CSS variables, and so are light or dark as it is.
"""

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from edge_daemon.report import Summary, counted, duration, quantile, shortened
from edge_daemon.telemetry import HOT_C

SLICES = 96
"""Points in time of a plot at most: more cannot be told apart, and a page stays small however long the log is."""
MINUTE, HOUR, DAY = 60, 3600, 86_400
WIDTHS_S = (MINUTE, 5 * MINUTE, 15 * MINUTE, HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 7 * DAY, 28 * DAY)
UNITS_S = {"seconds": 1, "minutes": MINUTE, "hours": HOUR, "days": DAY}
MODELS = 8
MAX_NAME = 24
FEWEST_ROWS = 3
INCHES = (5.2, 3.1)
BOX = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles that a box and its whiskers show."""

# Colours that matplotlib can parse, each to be replaced by a variable of the page.
INK, GRID, GOOD, BAD, FIRST, SECOND = (f"#12345{digit}" for digit in range(6))
VARIABLES = {INK: "--ink", GRID: "--line", GOOD: "--good", BAD: "--bad", FIRST: "--first", SECOND: "--second"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, sharp, and in the font of the page
    "svg.hashsalt": "edge-llm",
    "text.parse_math": False,  # names come from outside
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture with its title, as an ``<svg>`` element."""

    title: str
    svg: str


@dataclass(frozen=True, slots=True)
class _Slices:
    """The time from the first to the last row in equal slices: their middles (days), and which one each row is in."""

    at: Any
    of_row: Any
    width_s: float

    def values(self, column: Any, pick: Callable[[Any], float]) -> Any:
        """``pick`` of what was measured in each slice; NaN where nothing was."""
        picked = np.full(len(self.at), np.nan)
        measured = np.isfinite(column)
        rows, found = self.of_row[measured], column[measured]
        order = np.argsort(rows, kind="stable")
        rows, found = rows[order], found[order]
        edges: Any = np.searchsorted(rows, np.arange(len(self.at) + 1))
        for index, (begin, end) in enumerate(pairwise(edges)):
            if end > begin:
                picked[index] = pick(found[begin:end])
        return picked


def draw(summary: Summary) -> list[Plot]:
    """The plots for which the log has something to show."""
    plots: list[Plot] = []
    tasks, samples = summary.tasks.values, summary.samples.values
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that our font lacks: the browser's will do
        if summary.tasks.at:
            slices = _slices(summary.tasks.at)
            plots.append(_tasks(slices, np.array(tasks["succeeded"]), np.array(tasks["withdrawn"])))
            plots.append(_waits(slices, np.array(tasks["wait_s"])))
        speeds = {name: sorted(model.tokens_per_s) for name, model in summary.models.items() if model.tokens_per_s}
        if speeds:
            plots.append(_speeds(speeds))
        loads = {name: model.load_s for name, model in summary.models.items() if model.load_s}
        if loads:
            plots.append(_loads({name: (len(seconds), sum(seconds)) for name, seconds in loads.items()}))
        if summary.samples.at:
            slices = _slices(summary.samples.at)
            for name, plot in (("memory_percent", _memory), ("temperature_c", _temperature)):
                column = np.array(samples[name])
                if np.isfinite(column).any():
                    plots.append(plot(slices, column))
    return plots


def _slices(at: Sequence[float]) -> _Slices:
    """Of a width that people count in, so that the rhythm of a day is seen as it is."""
    times = np.array(at)
    span_s = times.max() - times.min()
    width_s = next((width for width in WIDTHS_S if span_s <= (SLICES - 1) * width), span_s / (SLICES - 1))
    first = times.min() // width_s
    of_row = (times // width_s - first).astype(int)
    middles = (first + 0.5 + np.arange(of_row.max() + 1)) * width_s
    return _Slices(date2num((middles * 1e6).astype("datetime64[us]")), of_row, width_s)


def _tasks(slices: _Slices, succeeded: Any, withdrawn: Any) -> Plot:
    title = f"Tasks that ended, per {duration(slices.width_s)}"
    figure, axes = _canvas(title, "tasks")
    failed = (succeeded == 0) & (withdrawn == 0)
    below = np.zeros(len(slices.at))
    kinds = (("succeeded", GOOD, succeeded), ("cancelled, expired", SECOND, withdrawn), ("failed", BAD, failed))
    for label, colour, which in kinds:
        counts = np.bincount(slices.of_row[which > 0], minlength=len(slices.at))
        if counts.any():
            axes.bar(slices.at, counts, slices.width_s / DAY, bottom=below, color=colour, label=label)
        below += counts
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return _over_time(figure, axes, slices, title)


def _waits(slices: _Slices, wait_s: Any) -> Plot:
    title = "Wait before the answer was begun"
    median = slices.values(wait_s, lambda values: float(np.median(values)))
    late = slices.values(wait_s, lambda values: quantile(sorted(values), 0.95))
    unit = _unit(float(np.nanmax(late)))
    figure, axes = _canvas(title, unit)
    axes.plot(slices.at, late / UNITS_S[unit], ".-", color=SECOND, label="95th percentile")
    axes.plot(slices.at, median / UNITS_S[unit], ".-", color=FIRST, label="median")
    axes.set_ylim(bottom=0)
    return _over_time(figure, axes, slices, title)


def _memory(slices: _Slices, percent: Any) -> Plot:
    title = "Memory in use"
    figure, axes = _canvas(title, "% of the board's memory")
    axes.fill_between(slices.at, slices.values(percent, np.max), color=FIRST, alpha=0.25, linewidth=0, label="most")
    axes.plot(slices.at, slices.values(percent, np.median), ".-", color=FIRST, label="median")
    axes.set_ylim(0, 100)
    return _over_time(figure, axes, slices, title)


def _temperature(slices: _Slices, celsius: Any) -> Plot:
    title = "Temperature of the hottest sensor"
    figure, axes = _canvas(title, "°C")
    axes.plot(slices.at, slices.values(celsius, np.max), ".-", color=SECOND, label="highest")
    axes.plot(slices.at, slices.values(celsius, np.median), ".-", color=FIRST, label="median")
    axes.axhline(HOT_C, color=BAD, linestyle="--", label="a Pi slows down")
    return _over_time(figure, axes, slices, title)


def _speeds(speeds: dict[str, list[float]]) -> Plot:
    title = "Speed of writing, by model"
    figure, axes = _canvas(title, "")
    shown = sorted(speeds.items(), key=lambda item: len(item[1]), reverse=True)[:MODELS]
    for row, (_, values) in enumerate(shown):
        low, left, middle, right, high = (quantile(values, share) for share in BOX)
        axes.plot([low, high], [row, row], "|-", color=INK)
        axes.barh(row, right - left, left=left, color=FIRST, alpha=0.6)
        axes.plot([middle], [row], "|", color=INK, markersize=18)
    axes.set_yticks(range(len(shown)), [shortened(name, MAX_NAME) for name, _ in shown])
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens per second; the box is the middle half")
    return _by_name(figure, axes, len(shown), title)


def _loads(loads: dict[str, tuple[int, float]]) -> Plot:
    title = "Time spent loading, by model"
    figure, axes = _canvas(title, "")
    shown = sorted(loads.items(), key=lambda item: item[1][1], reverse=True)[:MODELS]
    unit = _unit(shown[0][1][1])
    sums = [seconds / UNITS_S[unit] for _, (_, seconds) in shown]
    bars = axes.barh([shortened(name, MAX_NAME) for name, _ in shown], sums, color=SECOND)
    axes.bar_label(bars, [counted(count, "load") for _, (count, _) in shown], padding=4)
    axes.margins(x=0.36)
    axes.set_xlabel(unit)
    return _by_name(figure, axes, len(shown), title)


def _canvas(title: str, unit: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=INCHES, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    return figure, axes


def _over_time(figure: Figure, axes: Any, slices: _Slices, title: str) -> Plot:
    half_days = slices.width_s / DAY / 2
    axes.set_xlim(slices.at[0] - half_days, slices.at[-1] + half_days)  # or a single slice would lie among years
    locator = AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axes.set_xlabel("time, UTC")
    axes.legend(loc="upper right", bbox_to_anchor=(1, -0.22), ncols=3)
    return _plot(figure, title)


def _by_name(figure: Figure, axes: Any, rows: int, title: str) -> Plot:
    axes.set_ylim(max(rows, FEWEST_ROWS) - 0.5, -0.5)  # the first on top; a single bar does not fill it all
    axes.grid(visible=False, axis="y")
    return _plot(figure, title)


def _unit(longest_s: float) -> str:
    """The largest of ``UNITS_S`` in which the longest time is two or more."""
    return next((unit for unit, size in reversed(UNITS_S.items()) if longest_s >= 2 * size), "seconds")


def _plot(figure: Figure, title: str) -> Plot:
    """The figure as one element that fits into any width, without the head of a file."""
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    label = f'role="img" aria-label="{html.escape(title)}"'
    return Plot(
        title, re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', rf"<svg {label} \1>", text, count=1, flags=re.DOTALL)
    )
