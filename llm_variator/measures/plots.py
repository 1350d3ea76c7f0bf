"""Figures of matplotlib, made without a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.extras import needed


def matplotlib() -> Any:
    """The library; raises VariatorError where it is missing."""
    needed("matplotlib.figure", "drawing", "report")
    return needed("matplotlib", "drawing", "report")


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write the figure as what `path` ends in.

    Raises:
        VariatorError: that is none of matplotlib's formats, or the file cannot be written.
    """
    kinds, kind = figure.canvas.get_supported_filetypes(), path.suffix.lstrip(".").lower()
    if kind not in kinds:
        raise VariatorError(
            f"--plot {path}: choose a file name that ends with one of .{', .'.join(sorted(kinds))}"
        )
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, **options))
