"""The page's parts as HTML: one template for the live page and the export, in the report's colours and type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

import llm_variator
from llm_variator import report
from llm_variator.measures.compare import DENSE
from llm_variator.playground.panels import Panel
from llm_variator.playground.view import View

_HERE, _REPORT = Path(__file__).parent, Path(report.__file__).parent


def environment() -> jinja2.Environment:
    """Templates of this folder, and the report's style sheet."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([_HERE, _REPORT]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip


def styles(name: str) -> str:
    """One style sheet."""
    return environment().get_template(name).render()


def answers(panels: Sequence[Panel]) -> str:
    """Answers side by side, as a fragment."""
    return environment().get_template("answers.html.j2").render(panels=panels)


def document(pieces: Sequence[str], views: Sequence[View], start: int = 1) -> str:
    """A page of the document alone, its tokens shaded; view number `start` first, or the last."""
    return _page(pieces, views, start, bare=True)


def whole(
    pieces: Sequence[str], views: Sequence[View], panels: Sequence[Panel], *, model: str, command: str
) -> str:
    """A page of one prompt that needs nothing else."""
    names = [view.plugin for view in views if view.plugin != DENSE]
    return _page(
        pieces, views, 1, bare=False, panels=panels, model=model, command=command, tokens=len(pieces),
        plugins=", ".join(names) or "no plugin",
    )  # fmt: skip


def _page(pieces: Sequence[str], views: Sequence[View], start: int, **more: Any) -> str:
    start = min(start, len(views) - 1)
    data = {"pieces": list(pieces), "views": [view.data() for view in views], "start": start}
    version = llm_variator.__version__
    return environment().get_template("page.html.j2").render(data=data, version=version, **more)
