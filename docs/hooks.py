"""For mkdocs: pages may show and link what lies in ../eval/results, outside the folder of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "eval" / "results"


def on_files(files: Any, *, config: Any) -> Any:
    """Add the plots and figures that are stored there, as results/NAME."""
    for path in sorted(RESULTS.iterdir()):
        if path.suffix in (".json", ".png"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links lead to them; in the repository they are right as they stand."""
    return markdown.replace("](../eval/results/", "](results/")
