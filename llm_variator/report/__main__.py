"""`python -m llm_variator.report`: one HTML page of all stored results, and its drawings for papers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_variator import cli
from llm_variator.cli import flag
from llm_variator.cli.values import OutputFile
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.report.charts import save
from llm_variator.report.page import build
from llm_variator.report.results import read_results


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One self-contained HTML page of all stored results.

    Quality against cost, the paper's tables and figures beside ours, speed against its bound. What is not stored is
    shown as missing.
    """

    results: Path = flag(Path("eval/results"), "folder of result files", metavar="DIR")
    output: OutputFile = flag(Path("report.html"), "the page", metavar="FILE")
    figures: Path | None = flag(None, "write every drawing there too, as SVG and PNG", metavar="DIR")


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives."""
    return cli.read(Settings, argv, prog="python -m llm_variator.report")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page."""
    settings = read(argv)
    if not settings.results.is_dir():
        raise VariatorError(f"--results {settings.results}: no such folder; results are stored by --json")
    results, problems = read_results(settings.results)
    folder = Path(os.path.relpath(settings.results.absolute(), settings.output.absolute().parent)).as_posix()
    page = build(results, problems, folder=folder)
    write_atomically(settings.output, page.html)
    print(f"{settings.output}: {len(results)} result files, {len(page.html) / 1e3:,.0f} kB")
    for problem in problems:
        print(f"not shown: {problem.file}: {problem.reason}")
    if settings.figures is not None:
        drawings = [each for each in page.drawings.by_name.values() if any(s.points for s in each.series)]
        files = [file for drawing in drawings for file in save(drawing, settings.figures)]
        print(f"{len(files)} files in {settings.figures}")


if __name__ == "__main__":
    cli.run(main)
