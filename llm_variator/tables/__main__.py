"""`python -m llm_variator.tables RECIPE`: run what a table still lacks, and write it as JSON and Markdown.

It can be stopped at any moment: called again, it goes on where it was. Cells that the results have of the same
recipe are kept, also where their runs are gone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_variator import cli
from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import Names
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.measures.results import scrub_paths, write_result
from llm_variator.tables.cost import row_costs
from llm_variator.tables.recipe import TableRecipe, read_table
from llm_variator.tables.render import averages, markdown, teacher_of
from llm_variator.tables.runner import Cell, Runner


@dataclass(frozen=True, kw_only=True)
class Settings(flags.LocalData):
    """Run the experiments behind a table that its results lack, and write the table."""

    recipe: Path = flag(REQUIRED, "the table: a YAML file", positional=True)
    model: str | None = flag(None, "in place of the recipe's: alias, local folder or hub id")
    rows: tuple[str, ...] = flag((), "run these only (default: all)", metavar="ROW")
    columns: Names = flag((), "run these tasks only, as in sst2,mnli (default: all)")
    runs: Path = flag(Path("runs/tables"), "where runs are kept", metavar="DIR")
    results: Path = flag(Path("eval/results"), "for NAME.json and NAME.md", metavar="DIR")
    device: Literal["auto", "cpu", "cuda"] | None = flag(
        None, "where to train (default: the recipe's, or auto)"
    )
    again: bool = flag(False, "also the cells that the results have already, where the recipe is the same")
    dry_run: bool = flag(False, "check the recipe and list the runs it lacks; run nothing")


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line gives."""
    return cli.read(Settings, argv, prog="python -m llm_variator.tables")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the table; each finished cell is written at once."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = read(argv)
    table = read_table(settings.recipe)
    _check_selection("row", settings.rows, [row.name for row in table.rows])
    _check_selection("column", settings.columns, table.columns)
    model = settings.model or table.model
    file = settings.results / f"{table.name}.json"
    cells = _known_cells(file, table, model)
    asked = [
        (row, task)
        for task in table.columns
        for row in table.rows
        if (not settings.rows or row.name in settings.rows)
        and (not settings.columns or task in settings.columns)
    ]
    chosen = [(row, task) for row, task in asked if settings.again or task not in cells.get(row.name, {})]
    circumstances = {"device": settings.device, "data_dir": settings.data_dir}
    shared: Any = {"model": settings.model, "circumstances": circumstances}
    plan = Runner(table, settings.runs, **shared, dry=True, say=print if settings.dry_run else _say_nothing)
    for row, task in chosen:  # a wrong flag of the last run must not wait until all others are done
        plan.cell(row, task)
    if settings.dry_run:
        return
    runner = Runner(table, settings.runs, **shared)
    costs = row_costs(table, model)
    to_do = list(chosen)
    while to_do:
        row, task = to_do.pop(0)
        cell = runner.cell(row, task)
        cells.setdefault(row.name, {})[task] = cell | {"recipe": table.digest(row, task, model)}
        cells = _in_order(cells, table)
        # a teacher that was lost was trained anew, and a column is to have one
        others = [one for one, column in asked if column == task and (one, column) not in to_do]
        to_do += [
            (one, task)
            for one in others
            if task in cells.get(one.name, {})
            and teacher_of(one, cells[one.name][task]) != teacher_of(row, cell)
        ]
        figures = {
            "title": table.title,
            "model": model,
            "cells": cells,
            "averages": averages(cells),
            "costs": costs,
            "paper": table.paper,
        }
        write_result(file, figures, command=["llm_variator.tables", *argv], seed=None, started=started)
        write_atomically(file.with_suffix(".md"), markdown(table, scrub_paths(model), cells, costs))
    text = markdown(table, scrub_paths(model), cells, costs)
    write_atomically(file.with_suffix(".md"), text)
    print(text)
    if chosen:
        print(f"written to {file} and {file.with_suffix('.md')}")
    else:
        print(f"{file} has all of these: --again measures them anew")


def _say_nothing(line: str) -> None:
    """For a plan that nobody asked to see."""


def _check_selection(what: str, wanted: Sequence[str], known: Sequence[str]) -> None:
    if surplus := [name for name in wanted if name not in known]:
        raise VariatorError(f"the table has no {what} {surplus[0]!r}; it has {', '.join(known)}")


def _known_cells(file: Path, table: TableRecipe, model: str) -> dict[str, dict[str, Cell]]:
    """Cells of an earlier call of which the recipe still says the same."""
    try:
        figures = json.loads(file.read_text(encoding="utf-8"))["figures"]
        found: dict[str, Any] = figures["cells"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VariatorError(f"{file} is no table that can be continued ({error}): move it away") from None
    if found and figures.get("model", scrub_paths(model)) != scrub_paths(model):
        raise VariatorError(
            f"{file} has the cells of {figures['model']}: give those of {model} another folder, as in --results "
            "runs/results"
        )
    kept = _in_order(found, table)
    for row in table.rows:
        for task, cell in list(kept.get(row.name, {}).items()):
            if cell.get("recipe") != table.digest(row, task, model):
                del kept[row.name][task]
    return kept


def _in_order(cells: dict[str, dict[str, Cell]], table: TableRecipe) -> dict[str, dict[str, Cell]]:
    rows = [row.name for row in table.rows if row.name in cells]
    return {row: {task: cells[row][task] for task in table.columns if task in cells[row]} for row in rows}


if __name__ == "__main__":
    cli.run(main)
