"""A benchmark's rows as a table on the terminal, JSON, Markdown and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
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
    "kv_mib": ("KV MiB", ",.2f"),
    "gib": ("GiB", ",.3f"),
}


def publish(
    args: argparse.Namespace,
    title: str,
    rows: Sequence[Row],
    figures: Mapping[str, Any],
    *,
    command: Sequence[str],
    started: float,
    note: str = "",
) -> None:
    """Print the rows and store what `--json`, `--markdown` and `--plot` ask for."""
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    table = Table(title=title)
    for name in shown:
        table.add_column(COLUMNS[name][0], justify="left" if name == "case" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row, name) for name in shown))
    console = Console()
    unlimited = console.options.update(max_width=1000)
    console.width = max(
        console.width, console.measure(table, options=unlimited).maximum
    )  # figures are never cut
    console.print(table)
    if note:
        console.print(note, style="dim")
    if args.json:
        write_result(args.json, {**figures, "rows": rows}, command=command, seed=args.seed, started=started)
    if args.markdown:
        write_atomically(args.markdown, markdown(title, rows, note))
    if args.plot:
        plot(args.plot, title, rows)


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    return "" if value is None else format(value, COLUMNS[name][1])


def markdown(title: str, rows: Sequence[Row], note: str = "") -> str:
    """The rows as a Markdown table under `title`."""
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [[COLUMNS[name][0] for name in shown], ["---"] * len(shown)]
    lines += [[_cell(row, name) for name in shown] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title}**\n\n{table}\n" + (f"\n{note}\n" if note else "")


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Time over dense by length, one line per case and batch size, its bound dashed.

    Raises:
        VariatorError: nothing to plot, matplotlib is missing, or the file's type is not known.
    """
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if {"tokens", "of_dense", "case"} <= row.keys():
            lines.setdefault((row["case"], row.get("batch", 1)), []).append(row)
    if not lines:
        raise VariatorError("--plot: this benchmark has no lengths to plot; leave it out")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise VariatorError("--plot needs matplotlib: pip install matplotlib") from None
    figure, axes = plt.subplots(figsize=(7, 4.5))
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
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, bbox_inches="tight")
    except ValueError as error:
        raise VariatorError(f"--plot {path}: {error}") from None
    finally:
        plt.close(figure)
