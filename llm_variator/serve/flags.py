"""What the commands of `llm_variator.serve` have in common."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from llm_variator.cli import flag
from llm_variator.cli.values import Names, PositiveInt
from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm.rows import AUTO, KEPT


def choice(value: Any) -> int | str:
    """0, a ratio, a name, or "auto"."""
    if value == AUTO or KEPT.fullmatch(str(value)):
        return str(value)
    if not str(value).isdecimal():
        raise ArgumentTypeError(f'expected 0, a ratio, a name (kv4) or "auto", got {value!r}')
    return int(value)


Choice = Annotated[int | str, choice]


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """Model and plugins: those that are not given are untrained, and cost the same."""

    model: str = flag("smollm2-135m", "alias, local folder or hub id")
    k: tuple[PositiveInt, ...] = flag((2, 4), "ratios")
    plugin: tuple[str, ...] = flag(
        (), "trained plugins of some ratios, or with names of their own", metavar="kN=PLUGIN"
    )
    sites: Names = flag(("ffn", "kv"), "of untrained plugins: ffn or ffn,kv")
    dense_tail: PositiveInt = flag(64, "dense last tokens of untrained plugins")
    dtype: str = flag("float32", "of the model, as vLLM calls it")


def parse_plugins(given: Sequence[str]) -> dict[str, str]:
    """`["k2=folder"]` -> {"k2": "folder"}."""
    plugins: dict[str, str] = {}
    for item in given:
        name, equals, plugin = item.partition("=")
        if not (name and equals and plugin):
            raise VariatorError(f"--plugin takes kN=PLUGIN, for instance k2=smollm2-135m/k2; got {item!r}")
        if name in plugins:
            raise VariatorError(f"--plugin names {name} twice: one plugin per ratio")
        plugins[name] = plugin
    return plugins


def split(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Our own words (default: of `sys.argv[1:]`), and vLLM's, which follow after a bare `--`."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]
