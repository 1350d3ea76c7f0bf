"""Figures of matplotlib, made without a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_variator.engine.files import write_atomically
from llm_variator.extras import needed


def matplotlib() -> Any:
    """The library; raises VariatorError where it is missing."""
    needed("matplotlib.figure", "drawing", "report")
    return needed("matplotlib", "drawing", "report")


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write the figure as what `path` ends in; raises VariatorError where the file cannot be written."""
    kind = path.suffix.lstrip(".").lower()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, **options))
