"""A table as Markdown: our figures, the paper's beside them, and what each was measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_variator.measures import tables
from llm_variator.sources.tasks import TASKS, average
from llm_variator.tables.cost import ANSWER, PARTS, TOKENS
from llm_variator.tables.recipe import Row, TableRecipe

PENDING = "pending"

_PARTS = {
    "parameters": "parameters",
    "operations": "operations",
    "decoder": "decoder's operations",
    "cross_entries": "entries of cross-attention",
}


def averages(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean over the seven tasks of every row that has them all."""
    return {
        row: average({task: cell["score"] for task, cell in columns.items()})
        for row, columns in cells.items()
        if all(task in columns for task in TASKS)
    }


def markdown(
    table: TableRecipe,
    model: str,
    cells: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, float]],
) -> str:
    """The table with a row per method; a cell reads "ours (paper's)", in percent.

    `cells`: of `Runner.cell` by row and task. `costs`: of `row_costs`.
    """
    means = averages(cells)
    with_mean = set(TASKS) <= set(table.columns)
    parts = [part for part in _PARTS if any(part in cost for cost in costs.values())] or list(PARTS)
    head = ["", *table.columns, *(["average"] if with_mean else []), *(_PARTS[part] for part in parts)]
    lines = []
    for row in table.rows:
        words = [row.name]
        for task in table.columns:
            cell = cells.get(row.name, {}).get(task)
            words.append(_shown(cell) + _beside(table.paper.get(row.name, {}).get(task)))
        if with_mean:
            mean = f"{means[row.name]:.1f}" if row.name in means else PENDING
            words.append(mean + _beside(table.paper.get(row.name, {}).get("average")))
        cost = costs.get(row.name)
        signs = {"parameters": "+"} if row.method == "variator" else {}
        words += [f"{signs.get(part, '')}{cost[part]:.1f} %" if cost else "100 %" for part in parts]
        lines.append(words)
    notes = [
        f"Model: {model}. In brackets: what the paper printed for its own models.",
        f"Parameters, and operations of reading {TOKENS} tokens (of T5 by its encoder), in per cent of the original.",
    ]
    if "decoder" in parts:
        notes.append(
            f"Decoder: an answer of {ANSWER} tokens to them, and the keys and values it reads of the input."
        )
    if table.seeds > 1:
        notes.append(f"Mean ± standard deviation of {table.seeds} adaptations that differ in their seed.")
    if table.note:
        notes.append(table.note)
    for task in table.columns:
        found = [columns[task] for columns in cells.values() if task in columns]
        if found:
            data = "; ".join(f"{what} {text}" for what, text in found[0]["data"].items())
            runs = [run for cell in found for run in cell.get("runs", [cell])]
            steps = sorted({run["steps"] for run in runs if "steps" in run})
            notes.append(
                f"{task}: {data}; steps: {', '.join(map(str, steps))}.{_teachers(table, cells, task)}"
            )
    text = [f"# {table.title}", "", tables.markdown(head, lines), ""]
    if distances := _distances(table, cells):
        notes.append(
            "Nats: KL from the fine-tuned model, per token of the answer, on the examples that chose the checkpoint."
        )
        text += [tables.markdown(["nats from the original", *table.columns], distances), ""]
    return "\n".join([*text, *(f"- {note}" for note in notes), ""])


def _teachers(table: TableRecipe, cells: Mapping[str, Mapping[str, Any]], task: str) -> str:
    """A sentence where cells of a task, measured on different days, have different fine-tuned models."""
    found = [teacher_of(row, cells[row.name][task]) for row in table.rows if task in cells.get(row.name, {})]
    scores = {_shown({"score": score}) for score in found if score}
    return f" Of several fine-tuned models: {', '.join(sorted(scores))}." if len(scores) > 1 else ""


def teacher_of(row: Row, cell: Mapping[str, Any]) -> dict[str, float] | None:
    """The score of the fine-tuned model behind a cell, by which it is known; None: not stored."""
    score: dict[str, float] | None = cell.get("score" if row.method == "original" else "teacher")
    return score


def _distances(table: TableRecipe, cells: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """How far each row's predictions are from its teacher's, which is less noisy than a score."""
    lines = []
    for row in table.rows:
        found = [cells.get(row.name, {}).get(task, {}) for task in table.columns]
        if any("nats_from_teacher" in cell for cell in found):
            lines.append([row.name, *(_distance(cell) for cell in found)])
    return lines


def _distance(cell: Mapping[str, Any]) -> str:
    if "nats_from_teacher" not in cell:
        return ""
    return f"{cell['nats_from_teacher']:.3f}" + (
        f" ± {cell['spread']['nats_from_teacher']:.3f}" if "spread" in cell else ""
    )


def _shown(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return PENDING
    spread = cell.get("spread", {})
    return "/".join(
        f"{value:.1f}" + (f" ± {spread[metric]:.1f}" if spread else "")
        for metric, value in cell["score"].items()
    )


def _beside(paper: Any) -> str:
    return "" if paper is None else f" ({paper})"
