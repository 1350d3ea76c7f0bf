"""Drawings of results, by matplotlib: SVG inside the page in the page's colours, and files for papers."""

from __future__ import annotations

import dataclasses
import io
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_variator.engine.files import write_atomically
from llm_variator.measures import plots
from llm_variator.report.labels import beside

INK, LINE = "#1f2328", "#d5dae1"
PALETTE = ("#1f6fb2", "#c2570c", "#2f7d4f", "#7a4fb0", "#b3262e", "#0e7490", "#8a6d3b", "#5f6b7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FORMATS = ("svg", "png")
_WIDTH, _HEIGHT, _LEGEND_LINE = 4.6, 3.0, 0.22  # inches
_LABEL = 8.5  # points


@dataclasses.dataclass(frozen=True)
class Series:
    """One line, or points without a line."""

    label: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    dashed: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int | None = None
    """Place in the palette; by default the series' own place."""
    errors: Sequence[float | None] = ()
    """Standard error of each point's y, where it is known."""
    labels: Sequence[str] = ()
    """Written beside each point."""
    steps: bool = False
    """A line that changes its height at the points only."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """What to draw."""

    name: str
    x: str
    y: str
    series: Sequence[Series]
    log2: bool = False
    logy: bool = False
    from_zero: bool = False
    levels: Sequence[tuple[str, float, int]] = ()
    """Horizontal lines: label, value, place in the palette."""
    ticks: Sequence[float] = ()
    linear_below: float | None = None
    """Draw y logarithmically, but linearly between 0 and this."""
    height: float = _HEIGHT
    """In inches, without the legend."""


_STYLE: Any = {
    "font.size": 10.5, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.8, "axes.linewidth": 0.8, "svg.fonttype": "none",
    "axes.axisbelow": True,
}  # fmt: skip


def _figure(drawing: Drawing) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    entries = len(drawing.series) + len(drawing.levels)
    labels = [each.label for each in drawing.series] + [level[0] for level in drawing.levels]
    columns = max(1, min(4, entries, 66 // (max(map(len, labels), default=1) + 6)))
    lines = -(-entries // columns)
    figure = Figure(figsize=(_WIDTH, drawing.height + _LEGEND_LINE * lines), layout="constrained")
    axes = figure.subplots()
    for place, series in enumerate(drawing.series):
        _add(axes, series, place if series.colour is None else series.colour)
    for label, value, place in drawing.levels:
        axes.axhline(value, color=PALETTE[place % len(PALETTE)], linestyle=":", linewidth=1.4, label=label)
    axes.set(xlabel=drawing.x, ylabel=drawing.y)
    if drawing.log2:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if drawing.ticks:
        axes.set_xticks(drawing.ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    if drawing.linear_below is not None:
        _half_logarithmic(axes, drawing.linear_below)
    elif drawing.logy:
        axes.set_yscale("log")
    elif drawing.from_zero:
        axes.set_ylim(bottom=0)
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, handlelength=1.6,
        columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip
    named = [
        pair for each in drawing.series for pair in zip(each.points, each.labels, strict=bool(each.labels))
    ]
    if named:
        axes.margins(x=0.12, y=0.06)
        figure.set_dpi(72)
        FigureCanvasAgg(figure)  # measures texts
        figure.draw_without_rendering()  # so that limits and layout stand
        beside(axes, [point for point, _ in named], [label for _, label in named], _LABEL, _lines(drawing))
    return figure


def _lines(drawing: Drawing) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """What stands in the way of labels: error bars and steps."""
    found = []
    for series in drawing.series:
        for (x, y), error in zip(series.points, series.errors, strict=False):
            found.append(((x, y - (error or 0.0)), (x, y + (error or 0.0))))
        if series.steps:
            for (x, y), (x1, y1) in itertools.pairwise(series.points):
                found += [((x, y), (x1, y)), ((x1, y), (x1, y1))]
    return found


def _half_logarithmic(axes: Any, linear_below: float) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axes.set_yscale("symlog", linthresh=linear_below, linscale=0.6)
    marks = [0.0, *(linear_below * step * 10**n for n in range(6) for step in (1, 3))]
    axes.yaxis.set_major_locator(FixedLocator(marks))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _add(axes: Any, series: Series, place: int) -> None:
    colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
    hollow = place >= len(PALETTE)
    xs, ys = [point[0] for point in series.points], [point[1] for point in series.points]
    many = len(xs) > 12
    style = {"linestyle": ("--" if series.dashed else "-") if series.line else "none", "linewidth": 1.6}
    style |= {"marker": "" if (series.dashed or many) and series.line else marker, "markersize": 6}
    style |= {"markerfacecolor": "none"} if hollow else {}
    style |= {"drawstyle": "steps-post", "linewidth": 1.0, "alpha": 0.6} if series.steps else {}
    axes.plot(xs, ys, color=colour, label=series.label, **style)
    if any(series.errors):
        spans = [error or 0.0 for error in series.errors]
        axes.errorbar(xs, ys, yerr=spans, fmt="none", ecolor=colour, elinewidth=0.8, capsize=2, alpha=0.55)
    if series.low and series.high:
        axes.fill_between(xs, series.low, series.high, color=colour, alpha=0.18, linewidth=0)


def inline(drawing: Drawing) -> str:
    """An <svg> element whose colours are the page's, `var(--ink)`, `var(--line)`, `var(--c1)` and on.

    Its ids carry the drawing's name: several stand on one page.
    """
    text = _rendered(drawing, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    for colour, name in ((INK, "ink"), (LINE, "line"), *((c, f"c{n}") for n, c in enumerate(PALETTE, 1))):
        text = re.sub(re.escape(colour), f"var(--{name})", text, flags=re.IGNORECASE)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{drawing.name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\g<1>#{drawing.name}-", text)
    return text.replace("<svg ", '<svg aria-hidden="true" ', 1)


def save(drawing: Drawing, folder: Path) -> list[Path]:
    """Write the drawing into `folder` as SVG and PNG, for papers."""
    files = [folder / f"{drawing.name}.{kind}" for kind in FORMATS]
    for file in files:
        content = _rendered(drawing, file.suffix[1:])
        write_atomically(file, lambda place, content=content: Path(place).write_bytes(content))  # type: ignore[misc]
    return files


def _rendered(drawing: Drawing, kind: str) -> bytes:
    """The file's content."""
    buffer = io.BytesIO()
    about = {"Date": None} if kind == "svg" else {}
    with plots.matplotlib().rc_context(
        _STYLE | {"svg.hashsalt": drawing.name}
    ):  # ticks are made as late as they are drawn
        _figure(drawing).savefig(buffer, format=kind, dpi=200, transparent=kind == "svg", metadata=about)
    return buffer.getvalue()
