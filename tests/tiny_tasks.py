"""Tiny task data in a local folder: a handful of rows of every task, each of its own length."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llm_variator.sources.tasks import TASKS, Task

LINES = ("the red boat sails past a grey island", "while seven birds sing about warm summer rain")
WORDS = [word for line in LINES for word in line.split()]


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number + step * (1 + number % 3)) % len(WORDS)] for step in range(words))


def rows_of(task: Task, count: int) -> dict[str, list]:
    columns: dict[str, list] = {task.key: list(range(count))}
    for place, column in enumerate(task.columns):
        columns[column] = [text(7 * row + place, 2 + row % 4) for row in range(count)]
    if task.answers:
        columns[task.target] = [row % len(task.answers) for row in range(count)]
    else:
        answers = [columns["context"][row].split()[0] for row in range(count)]
        columns[task.target] = [{"text": [answer], "answer_start": [0]} for answer in answers]
    return columns


def write_tasks(folder: Path, *names: str, train: int = 16, validation: int = 6) -> Path:
    """`<task>/<split>.parquet` for the named tasks, or for all."""
    for name in names or TASKS:
        task = TASKS[name]
        for split, count in ((task.train, train), (task.validation, validation)):
            file = folder / name / f"{split.name}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table(rows_of(task, count)), file)
    return folder
