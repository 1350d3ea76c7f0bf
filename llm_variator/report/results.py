"""Stored results, read with doubt: a file may be cut short, foreign, or of another version.

A `Node` is a place in a file. Asking a node for what it does not hold gives an empty node, never an error, and what
a node shows names the file and the key (a JSON pointer, RFC 6901): nothing on the page can be a number without one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Number:
    """A number on the page, and where it was read."""

    text: str
    file: str
    key: str
    form: str
    """Python's format of the value times `scale`: `format(value * scale, form)` is `text`."""
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Node:
    """A value in a result file; None where there is none."""

    file: str
    key: str
    value: Any

    def __getitem__(self, name: str | int) -> Node:
        """What a mapping or list holds under `name`."""
        found = None
        if isinstance(self.value, dict):
            found = self.value.get(str(name))
        elif isinstance(self.value, list) and isinstance(name, int) and 0 <= name < len(self.value):
            found = self.value[name]
        part = str(name).replace("~", "~0").replace("/", "~1")
        return Node(self.file, f"{self.key}/{part}", found)

    def __iter__(self) -> Iterator[Node]:
        """The items of a list."""
        return (self[place] for place in range(self.size))

    def items(self) -> list[tuple[str, Node]]:
        """The pairs of a mapping."""
        return [(name, self[name]) for name in self.value] if isinstance(self.value, dict) else []

    def __contains__(self, name: object) -> bool:
        return isinstance(self.value, dict) and name in self.value

    @property
    def size(self) -> int:
        """Items of a list."""
        return len(self.value) if isinstance(self.value, list) else 0

    @property
    def last(self) -> Node:
        """The last item of a list."""
        return self[self.size - 1]

    @property
    def number(self) -> float | None:
        """The value, where it is a finite number."""
        kind = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        return self.value if kind and math.isfinite(self.value) else None

    @property
    def text(self) -> str:
        """The value, where it is a text."""
        return self.value if isinstance(self.value, str) else ""

    def show(self, form: str = ".3f", scale: float = 1.0) -> Number | None:
        """The value for the page; None where it is no number."""
        value = self.number
        if value is None:
            return None
        value = value * scale if scale != 1.0 else value
        return Number(
            format(int(value) if form.endswith("d") else value, form), self.file, self.key, form, scale
        )


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file that cannot be shown."""

    file: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A readable result file."""

    name: str
    root: Node

    @property
    def figures(self) -> Node:
        """What was measured."""
        return self.root["figures"]

    @property
    def superseded_by(self) -> str:
        """The file whose figures hold in place of this one's, as this one says; empty for a current result."""
        return self.root["superseded_by"].text

    @property
    def title(self) -> str:
        """A table's title; empty for other results."""
        return self.figures["title"].text


def read_results(folder: Path) -> tuple[list[Result], list[Problem]]:
    """All .json files in `folder`: current results by name, then superseded ones; and what could not be read as one.

    A file that says it is superseded by one that is not there, or not current itself, is a problem: nobody could
    tell which figures hold.
    """
    results: list[Result] = []
    problems: list[Problem] = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        found = _read(file)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            results.append(found)
    current = {result.name for result in results if result.root["superseded_by"].value is None}
    shown = [result for result in results if result.name in current]
    for result in results:
        if result.superseded_by in current:
            shown.append(result)
        elif result.name not in current:
            said = result.root["superseded_by"].value
            reason = f'"superseded_by" is {said!r}, which is no current result in this folder: name the file that holds'
            problems.append(Problem(result.name, reason))
    return shown, problems


def _read(file: Path) -> Result | Problem:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        return Problem(file.name, f"cannot be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return Problem(file.name, f"not a whole JSON file: {error}"[:200])
    if not isinstance(content, dict) or not isinstance(content.get("figures"), dict):
        return Problem(file.name, 'no result of this library: it has no mapping "figures"')
    return Result(file.name, Node(file.name, "", content))
