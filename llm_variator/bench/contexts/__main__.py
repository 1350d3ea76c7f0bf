"""`python -m llm_variator.bench.contexts load|questions|prefill|rounding|decode|pool`: what contexts save, measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_variator import cli
from llm_variator.bench.contexts import ageing, memory, pool, reuse, rounding
from llm_variator.bench.contexts.setting import Figures, Settings, build_model
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel

_FIGURES: dict[type[Settings], Callable[[VariatorModel, Any], Figures]] = {
    reuse.Load: reuse.load,
    reuse.Questions: reuse.questions,
    memory.Prefill: memory.prefill,
    rounding.Rounding: rounding.rounding,
    ageing.Decode: ageing.decode,
    pool.Pool: pool.pool,
}
_COMMANDS = {kind.command(): kind for kind in _FIGURES}
_PARTS: dict[str, Callable[[VariatorModel, Any], Figures]] = {
    "answer_from": reuse.answer_from,
    "memory_of": memory.memory_of,
}  # in a process of their own, by flag


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings of the measurement that a command line, with its recipe, names; their class tells which it is."""
    settings: Settings = cli.read_command(
        _COMMANDS, argv, prog="python -m llm_variator.bench.contexts", text="Measure contexts."
    )
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement, print its figures and store them."""
    started = time.perf_counter()
    settings = read(argv)
    model = build_model(settings)
    part = next((run for flag, run in _PARTS.items() if getattr(settings, flag, None)), None)
    with torch.inference_mode():
        if part is not None:
            print(json.dumps(part(model, settings)))
            return
        figures = _FIGURES[type(settings)](model, settings)
    plugin = settings.plugin
    if settings.random_init:
        plugin = "untrained, keeps keys" if settings.untrained == "keeps" else "untrained k=2"
    figures = {"model": settings.model, "plugin": plugin, "dtype": settings.dtype, **figures}
    print(json.dumps(figures, indent=2))
    if settings.json:
        command = ["llm_variator.bench.contexts", *(sys.argv[1:] if argv is None else argv)]
        write_result(settings.json, figures, command=command, seed=settings.seed, started=started)


if __name__ == "__main__":
    cli.run(main)
