"""The table of plugins side by side: on the terminal, in Markdown and as a plot. Knows no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_variator.measures import plots, tables

HF = "hf"
"""lm-eval's own model type, for comparison."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One column of the table."""

    label: str
    plugin: str | None = None
    """Shipped name, folder or hub id."""
    k: int | None = None
    """Of an untrained plugin that merges by means."""
    keep: float | None = None
    """Of an untrained plugin that keeps the first keys of every block: their share."""

    @property
    def described(self) -> str:
        """What it is, in words."""
        if self.k is not None:
            return f"untrained, means, k={self.k}"
        if self.keep is not None:
            return f"untrained, the first of every block kept, keep={self.keep:g}"
        return self.plugin or ("lm-eval's own model type" if self.label == HF else "the base model")


@dataclasses.dataclass(frozen=True)
class Quality:
    """One row of the table: a metric of a task, by label."""

    task: str
    metric: str
    higher_is_better: bool
    items: int
    data: str | None
    """Which rows of which data, where the task says so."""
    values: dict[str, float]
    stderr: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Cost of reading a prompt of so many tokens, by label."""

    tokens: int
    seconds: dict[str, float]
    """Median."""
    kv_bytes: dict[str, int] | None
    """None for T5, whose encoder keeps no cache."""


def _cells(quality: Sequence[Quality], prefill: Sequence[Prefill]) -> list[list[str]]:
    """The table's rows of text: what, then one cell per label. Ratios are to the first column that was timed."""
    labels = list(quality[0].values)
    rows = []
    for row in quality:
        better = "" if row.higher_is_better else " (less is better)"
        rows.append([f"{row.task} {row.metric}{better}", *(f"{row.values[label]:.4f}" for label in labels)])
    for cost in prefill:
        measures: list[tuple[str, Mapping[str, float], float, str]] = [
            ("prefill, ms", cost.seconds, 1e3, ".0f")
        ]
        if cost.kv_bytes is not None:
            measures.append(("KV cache, MiB", cost.kv_bytes, 2**-20, ".2f"))
        for what, values, unit, form in measures:
            base = next(iter(values.values()))
            cells = [
                f"{values[label] * unit:{form}} ({values[label] / base:.2f})" if label in values else "-"
                for label in labels
            ]
            rows.append([f"{what}, {cost.tokens} tokens", *cells])
    return rows


def show(quality: Sequence[Quality], prefill: Sequence[Prefill], model: str) -> None:
    """Print the table."""
    tables.show(model, ["", *quality[0].values], _cells(quality, prefill))


def markdown(
    quality: Sequence[Quality], prefill: Sequence[Prefill], model: str, entries: Sequence[Entry]
) -> str:
    """The table as a Markdown document."""
    table = tables.markdown(["", *quality[0].values], _cells(quality, prefill))
    lines = [f"# {model}: plugins side by side", "", table]
    lines += ["", "In brackets: relative to the first column timed.", ""] if prefill else [""]
    lines += [f"- {entry.label}: {entry.described}" for entry in entries]
    lines += ["", "Items per task:", ""]
    data = {row.task: f"{row.items} items" + (f", from {row.data}" if row.data else "") for row in quality}
    lines += [f"- {task}: {text}" for task, text in data.items()]
    return "\n".join(lines) + "\n"


def plot(path: Path, quality: Sequence[Quality], prefill: Sequence[Prefill], model: str) -> None:
    """Quality per task (metrics of which more is better) and cost relative to the first column, into `path`."""
    figure = plots.matplotlib().figure.Figure(figsize=(13, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    right.set_visible(bool(prefill))
    labels = list(quality[0].values)
    chosen = [row for row in quality if row.higher_is_better]
    _bars(left, [f"{row.task}\n{row.metric}" for row in chosen], [row.values for row in chosen], labels)
    left.set_title(f"{model}: quality")
    left.set_ylim(0, 1)
    costs: list[tuple[str, Mapping[str, float]]] = [
        (f"prefill\n{cost.tokens}", cost.seconds) for cost in prefill
    ]
    costs += [(f"KV\n{cost.tokens}", cost.kv_bytes) for cost in prefill if cost.kv_bytes is not None]
    ratios = [
        {label: value / next(iter(each.values())) for label, value in each.items()} for _, each in costs
    ]
    _bars(right, [name for name, _ in costs], ratios, labels)
    right.set_title("cost, of the first column")
    left.legend()
    plots.save(figure, path, dpi=110)


def _bars(
    axes: Any, names: Sequence[str], rows: Sequence[Mapping[str, float]], labels: Sequence[str]
) -> None:
    """Groups of bars, one group per name; a label that a row lacks leaves its place, and its colour, free."""
    width = 1 / (len(labels) + 1)
    for number, label in enumerate(labels):
        places = [place + number * width for place in range(len(rows))]
        axes.bar(places, [row.get(label, 0.0) for row in rows], width, label=label)
    axes.set_xticks([place + (len(labels) - 1) * width / 2 for place in range(len(rows))], names)
    axes.tick_params(axis="x", labelsize=7, labelrotation=45 if len(rows) > 6 else 0)
