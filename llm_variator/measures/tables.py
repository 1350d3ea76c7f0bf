"""A table of text on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def show(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    below: Iterable[Sequence[str]] = (),
    *,
    left: int = 1,
    note: str = "",
) -> None:
    """Print the rows, `below` under a line and `note` to stdout; all columns but the first `left` to the right.

    Wider than the terminal where the rows need it: figures are never cut.
    """
    table = Table(title=title)
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    table.add_section()
    for row in below:
        table.add_row(*row)
    console = Console()
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)
    if note:
        console.print(note, style="dim")


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], rule: str = "---") -> str:
    """The rows as a Markdown table; `rule` aligns all columns but the first."""
    lines = [columns, ["---", *[rule] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
