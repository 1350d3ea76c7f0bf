"""The runs behind a table: each in a folder named by its settings, done once, resumed where it was stopped.

Runs with the same settings are the same run, within a table and between tables: the fine-tuned model of a task
and the pre-trained plugin are shared by all cells that need them.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import shutil
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.evaluate.__main__ import main as evaluate
from llm_variator.measures.results import scrub_paths
from llm_variator.tables.recipe import Flags, Row, TableRecipe, as_argv
from llm_variator.train.__main__ import RESULT_FILE
from llm_variator.train.__main__ import main as train
from llm_variator.train.__main__ import read as train_settings
from llm_variator.train.fitting import MOMENTS_FILE
from llm_variator.train.settings import FREE_ON_RESUME, check_machine
from llm_variator.train.trainer import START, checkpoints, last_complete_checkpoint

Cell = dict[str, Any]

ORIGINS = "origins.json"
"""In a run's folder: marks of the runs that it started from, by name."""
_OF_WEIGHTS = ("held_out", "held_out_history", "loss_history")  # figures that differ where the weights do

# Where a run happens, not what it is: no part of its name.
_CIRCUMSTANCES = FREE_ON_RESUME | {"device"}


class Runner:
    """Does the runs of a table that are not done yet."""

    def __init__(
        self,
        table: TableRecipe,
        folder: Path,
        *,
        model: str | None = None,
        circumstances: Flags | None = None,
        dry: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """Set up; nothing runs yet.

        Args:
            table: the recipe.
            folder: where runs are kept, one folder each.
            model: in place of the recipe's.
            circumstances: flags of every run that do not change what comes out (device, data_dir).
            dry: only check the flags of each run, of a grid's first choice; cells are then empty.
            say: gets one line before each run.
        """
        self._table = table
        self._folder = folder
        self._model = model or table.model
        self._circumstances = {name: value for name, value in (circumstances or {}).items() if value}
        self._dry = dry
        self._say = say
        self._checked: set[Path] = set()

    def cell(self, row: Row, task: str) -> Cell:
        """The figures of one cell, from finished runs or new ones.

        `score`: by metric, in percent; `steps`, `data`, `command` and `wall_seconds` of the last run;
        `nats_from_teacher` (per token of the answer) and `teacher`, the fine-tuned model's own score, where one
        taught. Of several seeds `score` and the nats are means, `spread` the standard deviation of the scores, and
        `runs` has the cell of each.
        """
        teacher = self._searched(
            "finetune", self._table.flags("finetune", task=task), task=task, model=self._model
        )
        if row.method == "original":
            return _cell(teacher)
        start: dict[str, Any] = dict(row.plugin)
        if row.pretrain is not None:
            flags = {**self._table.flags("pretrain", row), **row.plugin}
            pretrained = self._train("pretrain", flags, model=self._model, method=row.method)
            start = {"plugin" if row.method == "variator" else "student": pretrained.as_posix()}
        if row.adapt is None:
            return self._taught(_cell(self._evaluated(teacher, task, start)), teacher)
        flags = {**self._table.flags("adapt", row, task), **start}
        cells = []
        for more in range(self._table.seeds):
            seed = {"seed": flags.get("seed", 0) + more} if more else {}
            named: dict[str, Any] = {"task": task, "model": teacher.as_posix(), "method": row.method}
            cells.append(_cell(self._searched("adapt", flags | seed, **named)))
        return self._taught(_over_seeds(cells), teacher)

    def _taught(self, cell: Cell, teacher: Path) -> Cell:
        taught_by = _cell(teacher)  # empty in a dry run, also where its folder is gone
        return cell | {"teacher": taught_by["score"]} if cell and taught_by else cell

    def _searched(self, stage: str, flags: Flags, **more: Any) -> Path:
        """The run with the best held-out figure of all combinations in `grid`; the only one without a grid."""
        flags = dict(flags)
        grid: Mapping[str, list[Any]] = flags.pop("grid", {})
        choices = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        folders = [
            self._train(stage, {**flags, **choice}, **more) for choice in choices[: 1 if self._dry else None]
        ]
        if len(folders) == 1:
            return folders[0]
        return max(folders, key=_best_score)

    def _train(self, stage: str, flags: Flags, **more: Any) -> Path:
        """Do one run unless it is done; returns its folder."""
        flags = {"stage": stage, **more, **flags}
        folder = self._folder / _run_name(flags)
        if self._is_done(folder, flags) or folder in self._checked:
            return folder
        self._say(f"{folder.name}: {_words(flags)}")
        if self._dry:
            self._checked.add(folder)
            check_machine(train_settings(as_argv(flags)))
            return folder
        resume = (folder / START).is_dir() or (folder / MOMENTS_FILE).is_file()
        if checkpoints(folder) and not resume:
            try:
                last_complete_checkpoint(folder)
                resume = True
            except VariatorError:  # killed before its first checkpoint was whole
                shutil.rmtree(folder)
        self._note_origins(folder, flags)
        argv = as_argv({**flags, **self._circumstances, "output": folder, "drop_checkpoints": True})
        train(argv + (["--resume"] if resume else []))
        gc.collect()
        return folder

    def _evaluated(self, model: Path, task: str, start: Flags) -> Path:
        """The score of an unadapted plugin, student or configuration on the fine-tuned model."""
        if "student" in start:
            flags: dict[str, Any] = {"model": start["student"]}
        elif "plugin" in start:
            flags = {"model": model.as_posix(), "plugin": start["plugin"]}
        else:
            raise VariatorError("a row with neither pre-training nor adaptation has nothing to measure")
        adapt = self._table.flags("adapt", task=task)
        flags |= {"task": task}
        flags |= {name: adapt[name] for name in ("max_length", "dtype") if name in adapt}
        if "test_limit" in adapt:
            flags["limit"] = adapt["test_limit"]
        folder = self._folder / _run_name({"stage": "evaluate", **flags})
        if self._is_done(folder, flags):
            return folder
        self._say(f"{folder.name}: {_words(flags)}")
        if not self._dry:
            self._note_origins(folder, flags)
            place = {name: value for name, value in self._circumstances.items() if name == "data_dir"}
            evaluate(["task", *as_argv({**flags, **place, "json": folder / RESULT_FILE})])
            gc.collect()
        return folder

    def _is_done(self, folder: Path, flags: Flags) -> bool:
        """Whether a run is done, from the models and plugins that are there now; what is of others is deleted."""
        file, now = folder / ORIGINS, self._origins(flags)
        if not file.is_file():
            return (folder / RESULT_FILE).is_file()
        known = json.loads(file.read_text(encoding="utf-8"))
        if all(known.get(name) == mark for name, mark in now.items()):
            return (folder / RESULT_FILE).is_file()
        if not self._dry:
            self._say(f"{folder.name} is of runs that were done anew since: once more")
            shutil.rmtree(folder)
        return False

    def _note_origins(self, folder: Path, flags: Flags) -> None:
        if now := self._origins(flags):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / ORIGINS, json.dumps(now))

    def _origins(self, flags: Flags) -> dict[str, str]:
        """Of the runs of this table that one starts from, what tells one attempt at each from the next."""
        marks = {}
        for name in ("model", "plugin", "student"):
            folder = Path(str(flags.get(name)))
            if folder.parent == self._folder and (folder / RESULT_FILE).is_file():
                figures = _result(folder)["figures"]
                marks[folder.name] = _mark([figures.get(of) for of in _OF_WEIGHTS])
        return marks


def _run_name(flags: Flags) -> str:
    kept = {name: value for name, value in flags.items() if name not in _CIRCUMSTANCES}
    # what a resumed run may change in general still makes another run in a table
    kept |= {
        name: flags[name] for name in ("max_steps", "patience", "test_limit", "eval_every") if name in flags
    }
    if flags.get("save_every") == 0:  # which keeps the last weights, not the best
        kept["save_every"] = 0
    if flags["stage"] == "pretrain" and "save_dtype" in flags:  # others start from what is saved
        kept["save_dtype"] = flags["save_dtype"]
    parts = [flags["stage"], flags.get("task"), flags.get("method")]
    return "-".join([*(part for part in parts if part), _mark(kept)])


def _mark(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _words(flags: Flags) -> str:
    return scrub_paths(" ".join(as_argv(flags)))


def _best_score(folder: Path) -> float:
    """Of what a run has kept."""
    figures = _result(folder)["figures"]
    history = dict(figures["held_out_history"])
    if not history:  # nothing was trained: its score is that of the whole test set
        return float(next(iter(figures["held_out"].values())))
    kept = figures.get("best_step")
    return float(history[max(history) if kept is None else kept])


def _result(folder: Path) -> dict[str, Any]:
    file = folder / RESULT_FILE
    try:
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VariatorError(f"{file} is not readable ({error}): delete {folder} to run it anew") from None
    return result


def _over_seeds(cells: list[Cell]) -> Cell:
    if len(cells) == 1:
        return cells[0]
    if not all(cells):
        return {}  # a dry run
    scores = {metric: [cell["score"][metric] for cell in cells] for metric in cells[0]["score"]}
    spread = {metric: statistics.stdev(values) for metric, values in scores.items()}
    distance: dict[str, float] = {}
    if all("nats_from_teacher" in cell for cell in cells):
        nats = [cell["nats_from_teacher"] for cell in cells]
        distance["nats_from_teacher"] = statistics.mean(nats)
        spread["nats_from_teacher"] = statistics.stdev(nats)
    return {
        **cells[-1],
        **distance,
        "score": {metric: statistics.mean(values) for metric, values in scores.items()},
        "spread": spread,
        "steps": max(cell["steps"] for cell in cells),
        "runs": cells,
    }


def _cell(folder: Path) -> Cell:
    if not (folder / RESULT_FILE).is_file():
        return {}  # a dry run
    result = _result(folder)
    figures = result["figures"]
    names = ("steps", "best_step", "held_out_history", "data", "nats_from_teacher", "bf16")
    kept = {name: figures[name] for name in names if figures.get(name) is not None}
    return {
        "score": figures["held_out"],
        **kept,
        "command": result["command"],
        "commit": result["commit"],
        "wall_seconds": result["wall_seconds"],
    }
