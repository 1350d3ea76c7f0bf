"""A table's recipe: its rows, its columns (tasks), and the settings of the runs behind each cell.

A recipe is a YAML mapping:

    title: what the table shows
    model: the base model
    columns: [sst2, mnli]
    options: {dtype: float32}                          # flags of every training run
    pretrain: {max_steps: 500}                         # flags of each stage
    finetune: {max_steps: 300, grid: {learning_rate: [1.0e-5, 3.0e-5]}}
    adapt: {max_steps: 400}                            # `grid` tries all combinations
    methods: {ltp: {adapt: {learning_rate: 5.0e-5}}}   # flags of all rows of one method, by stage
    tasks: {squad: {max_length: 384}}                  # flags of the runs on one task
    rows:
      Original: {method: original}                     # the fine-tuned model
      Variator: {plugin: {k: 4}}                       # pre-trained, then adapted to each task
      w/o PT: {plugin: {k: 4}, pretrain: false}
      LTP: {method: ltp, adapt: {max_steps: 100}}      # flags of this row's runs
    seeds: 3                                           # adaptations of each cell, whose mean and spread are shown
    paper: {Original: {sst2: 94.3}}                    # what the paper printed, shown beside ours

With `extends: OTHER.yaml`, a file beside it, whatever a recipe does not say is taken from there. Flags are those of
`python -m llm_variator.train`, with underscores.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_variator.cli import read_recipe
from llm_variator.errors import VariatorError
from llm_variator.sources.tasks import TASKS

METHODS = ("original", "variator", "distill", "ltp")
STAGES = ("finetune", "pretrain", "adapt")

Flags = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row: a method and what is particular to its runs."""

    name: str
    method: str = "variator"
    plugin: Flags = dataclasses.field(default_factory=dict)
    """Plugin flags."""
    pretrain: Flags | None = None
    """Overrides of the pre-training; None: none."""
    adapt: Flags | None = None
    """Overrides of the adaptation; None: none, the row is only measured."""


@dataclasses.dataclass(frozen=True)
class TableRecipe:
    """A whole table."""

    name: str
    title: str
    model: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    options: Flags
    stages: Mapping[str, Flags]
    methods: Mapping[str, Mapping[str, Flags]]
    tasks: Mapping[str, Flags]
    paper: Mapping[str, Mapping[str, Any]]
    note: str
    seeds: int = 1
    """Adaptations of each cell, from one fine-tuned model and one pre-trained plugin."""

    def flags(self, stage: str, row: Row | None = None, task: str | None = None) -> dict[str, Any]:
        """Flags of a run, the more particular ones winning: options, stage, task, method, row."""
        layers = [self.options, self.stages[stage], self.tasks.get(task, {}) if task else {}]
        if row is not None:
            of_row = row.pretrain if stage == "pretrain" else row.adapt
            layers += [self.methods.get(row.method, {}).get(stage, {}), of_row or {}]
        flags: dict[str, Any] = {}
        for given in layers:
            if grid := {name: tried for name, tried in flags.pop("grid", {}).items() if name not in given}:
                flags["grid"] = grid
            flags |= given
        return flags

    def digest(self, row: Row, task: str, model: str) -> str:
        """Short hash of all that the recipe says of one cell's runs."""
        stages = [
            self.flags("finetune", task=task),
            self.flags("pretrain", row),
            self.flags("adapt", row, task),
        ]
        several = [self.seeds] if self.seeds > 1 and row.adapt is not None else []
        said = [model, dataclasses.asdict(row), *stages, *several]
        text = json.dumps(said, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_table(path: str | Path) -> TableRecipe:
    """Read and check a recipe.

    Raises:
        VariatorError: the file cannot be read, or a key or value is wrong; the message names both.
    """
    path = Path(path)
    content = _read(path)

    def fail(message: str) -> VariatorError:
        return VariatorError(f"table {path}: {message}")

    known = {
        "title",
        "model",
        "columns",
        "options",
        "methods",
        "tasks",
        "rows",
        "paper",
        "note",
        "seeds",
        *STAGES,
    }
    for key in content:
        _check_name(key, known, fail)
    for key in ("title", "model", "columns", "rows"):
        if not content.get(key):
            raise fail(f"{key!r} is missing")

    def mapping(value: Any, of: str) -> dict[str, Any]:
        if not isinstance(value or {}, dict):
            raise fail(f"{of} must be a mapping of names, got {value!r}")
        return dict(value or {})

    def flags(value: Any, of: str) -> dict[str, Any]:
        given = mapping(value, of)
        if "config" in given:
            raise fail(f"{of}: flags stand here, not in a file that config names")
        for name, values in mapping(given.get("grid"), f"grid of {of}").items():
            if not isinstance(values, list) or not values:
                raise fail(f"grid of {of}: {name} must be a list of values, got {values!r}")
        return given

    for key in content.keys() - {"title", "model", "columns", "note", "seeds"}:
        content[key] = (flags if key in STAGES else mapping)(content[key], repr(key))
    if not isinstance(content["columns"], list):
        raise fail(f"'columns' must be a list of tasks, got {content['columns']!r}")
    seeds = content.get("seeds", 1)
    if type(seeds) is not int or seeds < 1:
        raise fail(f"seeds: {seeds!r} is no number of adaptations; give 1 or more")
    for task in [*content["columns"], *content.get("tasks", {})]:
        _check_name(task, set(TASKS), fail)
    tasks = {task: flags(given, f"task {task!r}") for task, given in content.get("tasks", {}).items()}
    methods: dict[str, dict[str, Flags]] = {}
    for method, stages in content.get("methods", {}).items():
        _check_name(method, set(METHODS), fail)
        methods[method] = {}
        for stage, given in mapping(stages, f"method {method!r}").items():
            _check_name(stage, set(STAGES), fail)
            methods[method][stage] = flags(given, f"method {method!r}, {stage}")
    rows = []
    for name, settings in content["rows"].items():
        settings = mapping(settings, f"row {name!r}")
        for key in settings:
            _check_name(key, {"method", "plugin", "pretrain", "adapt"}, fail)
        method = settings.get("method", "variator")
        _check_name(method, set(METHODS), fail)
        for stage in ("pretrain", "adapt"):
            never = method == "original" or (method == "ltp" and stage == "pretrain")
            given = settings.get(stage, {})
            without = never or given is False or given is None
            settings[stage] = None if without else flags(given, f"row {name!r}, {stage}")
        if method == "variator" and not mapping(settings.get("plugin"), f"row {name!r}, plugin"):
            raise fail(f"row {name!r} needs its plugin flags, e.g. plugin: {{k: 4}}")
        rows.append(Row(str(name), **settings))
    for name in content.get("paper", {}):
        _check_name(name, {row.name for row in rows}, fail)
    table = TableRecipe(
        name="-".join(path.with_suffix("").parts[-2:]) if path.parent.name else path.stem,
        title=str(content["title"]),
        model=str(content["model"]),
        columns=tuple(content["columns"]),
        rows=tuple(rows),
        options=content.get("options", {}),
        stages={stage: content.get(stage, {}) for stage in STAGES},
        methods=methods,
        tasks=tasks,
        paper=content.get("paper", {}),
        note=str(content.get("note", "")).strip(),
        seeds=seeds,
    )
    if any("grid" in table.flags("pretrain", row) for row in rows if row.pretrain is not None):
        raise fail("pretrain has no grid: there is no score of it to choose by; give one value each")
    for given in (table.flags("adapt", row, task) for row in rows for task in table.columns if seeds > 1):
        if "seed" in given.get("grid", {}) or type(given.get("seed", 0)) is not int:
            raise fail("seeds counts up from one whole number: give seed no other value, and no grid")
    return table


def as_argv(flags: Flags) -> list[str]:
    """The command line that says the same as a recipe's flags."""
    argv: list[str] = []
    for name, value in flags.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            argv.append(flag)
        elif isinstance(value, dict):
            argv.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, list) and name in ("data", "eval_data", "prompt_tokens"):
            argv += [flag, *map(str, value)]
        elif isinstance(value, list):
            argv.append(f"{flag}={','.join(map(str, value))}")
        elif value is not None and value is not False:
            argv.append(f"{flag}={value}")
    return argv


def _read(path: Path, before: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe with what it extends; settings below a key are merged, other values replaced."""
    if path.resolve() in before:
        raise VariatorError(f"table {path}: it extends itself")
    content = read_recipe(path)
    base = content.pop("extends", None)
    if base is None:
        return content
    return _merged(_read(path.parent / str(base), (*before, path.resolve())), content)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base[key], dict) else value
        for key, value in over.items()
        if key in base
    }
    return {**base, **over, **both}


def _check_name(name: Any, known: set[str], fail: Any) -> None:
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise fail(f"unknown {name!r}; {mend}")
