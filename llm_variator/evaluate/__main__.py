"""`python -m llm_variator.evaluate`: text continued after a compressed prompt, the paper's tasks, lm-eval's tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm_variator import cli
from llm_variator.evaluate import continuation, frontier, harness, sensitivity, task

Settings = continuation.Settings | task.Settings | frontier.Settings | sensitivity.Settings | harness.Settings


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives; their class tells the command."""
    words = _words(argv)
    if words[:1] == ["harness"]:
        return harness.read(words[1:])
    commands = {
        "continuation": continuation.Settings,
        "task": task.Settings,
        "frontier": frontier.Settings,
        "sensitivity": sensitivity.Settings,
        "harness": harness.Settings,
    }
    settings: Settings = cli.read_command(
        commands, words, prog="python -m llm_variator.evaluate", text="Measure the quality of plugins."
    )
    return settings


def _words(argv: Sequence[str] | None) -> list[str]:
    """The command line, with the word `harness` where it was left out."""
    words = list(sys.argv[1:] if argv is None else argv)
    left_out = bool(words) and words[0].startswith("-") and words[0] not in ("-h", "--help")
    return ["harness", *words] if left_out else words


def main(argv: Sequence[str] | None = None) -> None:
    """Run one evaluation, print its table and store its figures."""
    settings, words = read(argv), _words(argv)
    match settings:
        case continuation.Settings():
            continuation.run(settings, words)
        case task.Settings():
            task.run(settings, words)
        case frontier.Settings():
            frontier.run(settings, words)
        case sensitivity.Settings():
            sensitivity.run(settings, words)
        case harness.Settings():
            harness.run(settings, words)


if __name__ == "__main__":
    cli.run(main)
