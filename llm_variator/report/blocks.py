"""What a page is made of: sections of blocks. Data for the template; knows no result's form."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_variator.report.results import Number


@dataclasses.dataclass(frozen=True)
class Paper:
    """A figure that the paper printed."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """Ours, and the paper's beside it; either may be missing. Ours has several numbers where a task has."""

    ours: Sequence[Number]
    paper: Paper | None
    spread: Sequence[Number] = ()
    """Of each of ours between seeds; empty where there was one."""


Cell = str | Number | Paper | Pair | None


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    sources: Sequence[str] = ()
    folded: bool = False
    """Shown on demand: the numbers behind a chart."""
    kind: str = "table"


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing, its numbers in `table`."""

    name: str
    title: str
    svg: str
    caption: str
    table: Table | None = None
    sources: Sequence[str] = ()
    kind: str = "chart"


@dataclasses.dataclass(frozen=True)
class Missing:
    """A result that is not there, and the command that makes it."""

    title: str
    command: str
    kind: str = "missing"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A plugin to use, for whom, and why."""

    need: str
    plugin: str
    facts: Sequence[tuple[Number, str]]
    """Numbers, each with the words behind it."""
    where: str
    """What they were measured on."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    lead: str
    blocks: Sequence[Table | Chart | Missing]
