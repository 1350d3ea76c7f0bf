"""`python -m llm_variator.analyze neurons|merge`: what plugins do inside a model."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from llm_variator import cli
from llm_variator.analyze import merge, neurons
from llm_variator.measures.results import write_result

COMMANDS = {"neurons": neurons.Settings, "merge": merge.Settings}


def read(argv: Sequence[str] | None = None) -> neurons.Settings | merge.Settings:
    """The settings of an analysis, from a command line with its recipe."""
    found: neurons.Settings | merge.Settings = cli.read_command(
        COMMANDS, argv, prog="python -m llm_variator.analyze", text="See what plugins do."
    )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run one analysis, print its table and store its figures."""
    started = time.perf_counter()
    settings = read(argv)
    figures = neurons.run(settings) if isinstance(settings, neurons.Settings) else merge.run(settings)
    if settings.json is not None:
        command = ["llm_variator.analyze", *(sys.argv[1:] if argv is None else argv)]
        write_result(settings.json, figures, command=command, seed=settings.seed, started=started)
        print(f"stored in {settings.json}")


if __name__ == "__main__":
    cli.run(main)
