"""Examples of a task, from local copies or the hub; each knows which rows it comes from.

A local data folder holds `<task>/<split>.parquet` with the official rows, or, where those are not to be had,
`<task>/<split>_subset.parquet` with a part of them, or `<task>/<split>_rebuilt.parquet` with other rows made
by the same rules. Columns are named as on the hub.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.constants import HF_HUB_OFFLINE

from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import DATA_DIR_VARIABLE, data_folder, library
from llm_variator.sources.models import hub_reachable
from llm_variator.sources.tasks.table import Task, find_task

if TYPE_CHECKING:
    import pyarrow

_REBUILT = "_rebuilt"
_SUFFIXES = ("", "_subset", _REBUILT)  # of local file names; the first one found is read


@dataclass(frozen=True)
class Origin:
    """Where rows come from, and how they compare with the official split; a reported figure names it."""

    name: str
    """`<task>/<file>` in the data folder, or `<hub id>:<config>:<split>`; never a path of this machine."""
    rows: int
    """Rows found there."""
    official_rows: int
    """Rows of the official split."""
    official: bool
    """Whether the rows found are rows of the official split."""

    @property
    def complete(self) -> bool:
        """Whether these are all the official rows and nothing else."""
        return self.official and self.rows == self.official_rows

    def describe(self, used: int | None = None) -> str:
        """In words, as in "25,361 of 363,846 official rows (7.0 %)".

        Args:
            used: how many examples were used, where that may be fewer than `rows`.
        """
        count = self.rows if used is None else used
        if not self.official:
            return f"{count:,} rows, not the official ones"
        if count == self.official_rows:
            return f"all {count:,} official rows"
        return f"{count:,} of {self.official_rows:,} official rows ({count / self.official_rows:.1%})"


@dataclass(frozen=True)
class Example:
    """One row of a task. The prompts are put together on demand: whoever must shorten one shortens an input."""

    task: Task = field(repr=False)
    id: str
    inputs: Mapping[str, str]
    """Text per column of `task.columns`, without white space around it."""
    label: int | None
    """Index into `task.answers`; None where the answer is free text."""
    golds: tuple[str, ...]
    """The right answers: one for a label; for SQuAD all of the annotators', repetitions included."""
    origin: Origin = field(repr=False)

    @property
    def size(self) -> int:
        """Characters of its inputs, by which batches of similar length are made."""
        return sum(map(len, self.inputs.values()))

    @property
    def prompt(self) -> str:
        """For a seq2seq model, whose decoder starts with `DECODER_START`."""
        return self.task.template.format_map(self.inputs)

    @property
    def decoder_prompt(self) -> str:
        """For a decoder; continue it with `continuation`."""
        return self.task.decoder_template.format_map(self.inputs)

    @property
    def answer(self) -> str:
        """The text to train on; the first of `golds`."""
        return self.golds[0]

    @property
    def continuation(self) -> str:
        """The answer as it follows `decoder_prompt`: after a blank, which most tokenizers join to the word."""
        return f" {self.answer}"


def load_examples(
    task: Task | str,
    split: str,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """The examples of a split in the order of its source, never none.

    Args:
        task: an entry of `TASKS`, or its name.
        split: "train" or "validation" (for MNLI: matched).
        data_dir: folder of local copies, asked before the hub; default: the environment variable
            VARIATOR_DATA.
        limit: take this many rows, drawn at random; with one seed, more rows contain the fewer.
        seed: of that draw.

    Raises:
        VariatorError: no such task, split or data folder, data neither there nor on the hub, wrong columns
            or values.
    """
    if isinstance(task, str):
        task = find_task(task)
    if limit is not None and limit < 1:
        raise VariatorError(f"limit must be at least 1, got {limit}; leave it out for all rows")
    data_dir = data_folder(data_dir)
    table, origin = _read_local(task, split, data_dir) or _read_hub(task, split, data_dir)
    if limit is not None and limit < len(table):
        order = list(range(len(table)))
        random.Random(seed).shuffle(order)
        table = table.take(sorted(order[:limit]))
    return [_example(task, row, origin) for row in table.to_pylist()]


def _read_local(task: Task, split: str, data_dir: Path | None) -> tuple[pyarrow.Table, Origin] | None:
    """The rows of the first local file there is; None where there is none."""
    if data_dir is None:
        return None
    name = task.split(split).name
    for suffix in _SUFFIXES:
        file = data_dir / task.name / f"{name}{suffix}.parquet"
        if not file.is_file():
            continue
        pyarrow, parquet = library("pyarrow"), library("pyarrow.parquet")
        try:
            table = parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise VariatorError(f"{file}: not a readable Parquet file ({error})") from None
        return _checked(task, split, table, str(file), f"{task.name}/{file.name}", suffix != _REBUILT)
    return None


def _read_hub(task: Task, split: str, data_dir: Path | None) -> tuple[pyarrow.Table, Origin]:
    datasets = library("datasets")
    if not HF_HUB_OFFLINE and not hub_reachable():
        raise _not_found(task, split, data_dir, "it does not answer; HF_HUB_OFFLINE=1 reads what is cached")
    name = task.split(split).name
    try:
        rows = datasets.load_dataset(task.dataset, task.config, split=name)
    except Exception as error:  # no network, no such name, gated, wrong split: each has its own kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _not_found(task, split, data_dir, reason) from None
    source = ":".join(part for part in (task.dataset, task.config, name) if part)
    return _checked(task, split, rows.with_format("arrow")[:], source, source, official=True)


def _checked(
    task: Task, split: str, table: pyarrow.Table, where: str, name: str, official: bool
) -> tuple[pyarrow.Table, Origin]:
    """The columns of the task, and what the rows are; `where` is for errors, `name` for reports."""
    wanted = [task.key, *task.columns, task.target]
    if missing := [column for column in wanted if column not in table.column_names]:
        raise VariatorError(
            f"{where}: task {task.name!r} needs the columns {', '.join(wanted)}; missing "
            f"{', '.join(missing)} among {', '.join(table.column_names)}; rename or add them"
        )
    if not len(table):
        raise VariatorError(f"{where}: no rows; replace it")
    total = task.split(split).rows
    # More rows than the official split has cannot be its rows, whatever the file is called.
    origin = Origin(name, len(table), total, official and len(table) <= total)
    return table.select(wanted), origin


def _not_found(task: Task, split: str, data_dir: Path | None, reason: str) -> VariatorError:
    name = task.split(split).name
    files = ", ".join(f"{task.name}/{name}{suffix}.parquet" for suffix in _SUFFIXES)
    local = f"none of {files} in {data_dir}" if data_dir else "no --data-dir given to look in"
    return VariatorError(
        f"task {task.name!r}, split {split!r}: {local}, and {task.dataset} is not to be had from the Hugging "
        f"Face Hub ({reason}); give --data-dir (or {DATA_DIR_VARIABLE}) a folder that holds one of {files}"
    )


def _example(task: Task, row: Mapping[str, Any], origin: Origin) -> Example:
    def wrong(column: str, wanted: str) -> VariatorError:
        return VariatorError(
            f"{origin.name}, row with {task.key} {row[task.key]!r}: {column} must be {wanted}, "
            f"got {row[column]!r}; correct or drop the row"
        )

    for column in task.columns:
        if not isinstance(row[column], str):
            raise wrong(column, "text")
    inputs = {column: row[column].strip() for column in task.columns}
    target = row[task.target]
    if task.answers:
        if not isinstance(target, int) or target not in range(len(task.answers)):
            raise wrong(task.target, f"one of {', '.join(map(str, range(len(task.answers))))}")
        return Example(task, str(row[task.key]), inputs, target, (task.answers[target],), origin)
    golds = target.get("text") if isinstance(target, Mapping) else None
    if not golds or not all(isinstance(gold, str) for gold in golds):
        raise wrong(task.target, "a struct whose field text lists at least one answer")
    return Example(task, str(row[task.key]), inputs, None, tuple(golds), origin)
