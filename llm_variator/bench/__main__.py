"""`python -m llm_variator.bench prefill|decode|compile|swap|train|memory|compare|profile`: speed beside its bound."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_variator import cli
from llm_variator.bench import compiling, formulations, profiling, reading, swapping, training
from llm_variator.bench.report import publish
from llm_variator.bench.setting import Setting, Settings

_ROWS: dict[type[Settings], Callable[[Setting[Any]], list[dict[str, Any]]]] = {
    reading.Prefill: reading.prefill_rows,
    reading.Decode: reading.decode_rows,
    compiling.Compile: compiling.rows,
    swapping.Swap: swapping.rows,
    training.Train: training.train_rows,
    formulations.Compare: formulations.rows,
    profiling.Profile: profiling.rows,
}
_COMMANDS = {kind.command(): kind for kind in _ROWS}
_COMMANDS["memory"] = training.Memory


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings of the benchmark that a command line, with its recipe, names; their class tells which it is."""
    settings: Settings = cli.read_command(
        _COMMANDS,
        argv,
        prog="python -m llm_variator.bench",
        text="Dense and plugins in turns, medians with quartiles, beside the bound that the remaining operations or "
        "bytes set.",
    )
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark, print its table and store what is asked for."""
    started = time.perf_counter()
    settings = read(argv)
    figures: dict[str, Any] = {}
    if isinstance(settings, training.Memory):
        training.check_memory_flags(settings)
        rows, numbers = training.memory_rows(settings)
        figures = {"model": settings.model, **numbers}
        title = f"{settings.model}: training memory"
    else:
        setting = Setting(settings)
        rows = _ROWS[type(settings)](setting)
        figures = setting.facts()
        title = (
            f"{settings.model}, {figures['layers']} layers, {figures['dtype']}, {figures['device']}: "
            f"{settings.command()}"
        )
    command = ["llm_variator.bench", *(sys.argv[1:] if argv is None else argv)]
    publish(settings, title, rows, figures, command=command, started=started)


if __name__ == "__main__":
    cli.run(main)
