"""A benchmark's rows as a table on the terminal, JSON, Markdown and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_variator.bench.setting import Plotted, Settings
from llm_variator.engine.files import write_atomically
from llm_variator.measures import plots, tables
from llm_variator.measures.results import write_result

Row = Mapping[str, Any]

# column -> heading and format; a table shows those that its rows have, in this order
COLUMNS: Mapping[str, tuple[str, str]] = {
    "case": ("", "s"),
    "tokens": ("tokens", ",d"),
    "batch": ("batch", "d"),
    "eager_ms": ("eager ms", ",.2f"),
    "ms": ("ms", ",.2f"),
    "ms_low": ("from", ",.2f"),
    "ms_high": ("to", ",.2f"),
    "of_dense": ("of dense", ".3f"),
    "of_dense_low": ("from", ".3f"),
    "of_dense_high": ("to", ".3f"),
    "of_eager": ("of eager", ".3f"),
    "of_eager_low": ("from", ".3f"),
    "of_eager_high": ("to", ".3f"),
    "graphs": ("graphs", "d"),
    "breaks": ("breaks", "d"),
    "same": ("same", ""),
    "gain": ("times", ".3f"),
    "gain_low": ("from", ".3f"),
    "gain_high": ("to", ".3f"),
    "bound": ("bound", ".3f"),
    "of_bound": ("of bound", ".3f"),
    "card_ms": ("card ms", ",.2f"),
    "of_card": ("of card", ".3f"),
    "kernel": ("kernel", "s"),
    "calls": ("calls", ",d"),
    "share": ("share", ".3f"),
    "of_busy": ("of busy", ".3f"),
    "kv_mib": ("KV MiB", ",.2f"),
    "peak_gib": ("peak GiB", ",.2f"),
    "gib": ("GiB", ",.3f"),
}


def publish(
    settings: Settings,
    title: str,
    rows: Sequence[Row],
    figures: Mapping[str, Any],
    *,
    command: Sequence[str],
    started: float,
) -> None:
    """Print the rows and store what `--json`, `--markdown` and `--plot` ask for."""
    note = settings.note()
    tables.show(title, *_cells(rows), note=note)
    if settings.json:
        figures = {**figures, "rows": rows}
        write_result(settings.json, figures, command=command, seed=settings.seed, started=started)
    if settings.markdown:
        write_atomically(settings.markdown, markdown(title, rows, note))
    if isinstance(settings, Plotted) and settings.plot:
        plot(settings.plot, title, rows)


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text, of the columns that some row has."""
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [
        ["" if row.get(name) is None else format(row[name], COLUMNS[name][1]) for name in shown]
        for row in rows
    ]
    return [COLUMNS[name][0] for name in shown], lines


def markdown(title: str, rows: Sequence[Row], note: str = "") -> str:
    """The rows as a Markdown table under `title`."""
    return f"**{title}**\n\n{tables.markdown(*_cells(rows))}\n" + (f"\n{note}\n" if note else "")


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Time over dense by length, one line per case and batch size, its bound dashed; VariatorError: no such file."""
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["case"], row.get("batch", 1)), []).append(row)
    figure = plots.matplotlib().figure.Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for (case, batch), points in lines.items():
        tokens = [point["tokens"] for point in points]
        (line,) = axes.plot(tokens, [p["of_dense"] for p in points], "o-", label=f"{case}, batch {batch}")
        low, high = ([p[f"of_dense_{end}"] for p in points] for end in ("low", "high"))
        axes.fill_between(tokens, low, high, alpha=0.2, color=line.get_color())
        if all("bound" in point for point in points):
            axes.plot(tokens, [p["bound"] for p in points], "--", color=line.get_color(), alpha=0.6)
    axes.set(xlabel="tokens", ylabel="time, of dense", title=title, ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.legend(fontsize="small")
    plots.save(figure, path, bbox_inches="tight")
