"""The drawings of one page: each drawn once, and kept for the files of a paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_variator.report.blocks import Chart, Table
from llm_variator.report.charts import Drawing, inline


class Drawings:
    """The drawings of a page, by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Drawing] = {}

    def chart(
        self, drawing: Drawing, title: str, caption: str, table: Table | None, sources: Sequence[str]
    ) -> Chart:
        """Draw; a name that is taken gets a number."""
        name, number = drawing.name, 2
        while name in self.by_name:
            name, number = f"{drawing.name}-{number}", number + 1
        drawing = Drawing(**{**vars(drawing), "name": name})
        self.by_name[name] = drawing
        empty = not any(series.points for series in drawing.series)
        svg = "" if empty else inline(drawing)
        return Chart(name, title, svg, caption, table, list(sources))

    @staticmethod
    def slug(text: str) -> str:
        """A file's name as part of an id."""
        return re.sub(r"[^a-z0-9]+", "-", text.lower().removesuffix(".json")).strip("-")
