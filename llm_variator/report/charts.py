"""Drawings of results, by matplotlib: SVG inside the page in the page's colours, and files for papers."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_variator.engine.files import write_atomically
from llm_variator.measures import plots

INK, LINE = "#1f2328", "#d5dae1"
PALETTE = ("#1f6fb2", "#c2570c", "#2f7d4f", "#7a4fb0", "#b3262e", "#0e7490", "#8a6d3b", "#5f6b7a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FORMATS = ("svg", "png")
_WIDTH, _HEIGHT, _LEGEND_LINE = 4.6, 3.0, 0.22  # inches


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


_STYLE: Any = {
    "font.size": 10.5, "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": LINE, "grid.linewidth": 0.8, "axes.linewidth": 0.8, "svg.fonttype": "none",
    "axes.axisbelow": True,
}  # fmt: skip


def _figure(drawing: Drawing) -> Any:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter

    entries = len(drawing.series) + len(drawing.levels)
    labels = [each.label for each in drawing.series] + [level[0] for level in drawing.levels]
    columns = max(1, min(4, entries, 66 // (max(map(len, labels), default=1) + 6)))
    lines = -(-entries // columns)
    figure = Figure(figsize=(_WIDTH, _HEIGHT + _LEGEND_LINE * lines), layout="constrained")
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
    if drawing.logy:
        axes.set_yscale("log")
    elif drawing.from_zero:
        axes.set_ylim(bottom=0)
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=9.5, handlelength=1.6,
        columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip
    return figure


def _add(axes: Any, series: Series, place: int) -> None:
    colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
    hollow = place >= len(PALETTE)
    xs, ys = [point[0] for point in series.points], [point[1] for point in series.points]
    many = len(xs) > 12
    style = {"linestyle": ("--" if series.dashed else "-") if series.line else "none", "linewidth": 1.6}
    style |= {"marker": "" if (series.dashed or many) and series.line else marker, "markersize": 6}
    style |= {"markerfacecolor": "none"} if hollow else {}
    axes.plot(xs, ys, color=colour, label=series.label, **style)
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
