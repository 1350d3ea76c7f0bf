"""Quality against cost: all conditions of one model and text in one drawing, whichever files hold them; answers."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence

from llm_variator.report.blocks import Cell, Chart, Missing, Section, Table
from llm_variator.report.charts import Drawing, Series
from llm_variator.report.drawings import Drawings
from llm_variator.report.results import Node, Result
from llm_variator.sources.models.plugins import shipped_plugins

# key, heading, format, scale
_TEXT = (
    ("cross_entropy", "nats/token", ".3f", 1.0),
    ("above_dense", "above dense", "+.3f", 1.0),
    ("above_dense_error", "±", ".3f", 1.0),
    ("same_choice", "same choice, %", ".1f", 100.0),
    ("operations", "operations", ".3f", 1.0),
    ("kv_entries", "KV entries", ".3f", 1.0),
    ("kv_bytes", "KV bytes", ".3f", 1.0),
    ("prefill", "prefill time", ".2f", 1.0),
)
_ANSWERS = (
    ("exact_match", "exact match, %", ".1f", 1.0),
    ("f1", "F1", ".1f", 1.0),
    ("f1_above_dense", "above dense", "+.1f", 1.0),
    ("f1_above_dense_error", "±", ".1f", 1.0),
    ("same_answer", "same answer, %", ".1f", 1.0),
    ("gold_nats", "nats per gold token", ".3f", 1.0),
    ("gold_above_dense", "above dense", "+.3f", 1.0),
    ("gold_above_dense_error", "±", ".3f", 1.0),
    ("kv_entries", "KV entries", ".3f", 1.0),
    ("kv_bytes", "KV bytes", ".3f", 1.0),
)
_COMMAND = (
    "python -m llm_variator.evaluate frontier --model smollm2-135m --plugin smollm2-135m/k2 "
    "--json eval/results/smollm2-135m-frontier.json"
)
_PLACES = (("questions", ""), ("hidden_questions", ", the question after the prompt"))
DENSE, ABSENT = "dense", "no context"
SHIPPED, TRAINED, UNTRAINED, FOREIGN = (
    "shipped plugins",
    "other plugins",
    "without training",
    "other libraries",
)
_SPARED = 0.995  # of the dense cost: what is above spares nothing
_LINEAR_BELOW = 0.01  # nats: smaller losses are within their errors here


@dataclasses.dataclass(frozen=True)
class Row:
    """One condition on one text or one set of questions."""

    condition: str
    """A shipped plugin by its full name."""
    kind: str
    node: Node
    result: Result


@dataclasses.dataclass(frozen=True)
class Group:
    """What was measured on the same prompts, dense first, what lies farthest from dense last."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str]

    @property
    def files(self) -> list[str]:
        """Where the rows are from."""
        return list(dict.fromkeys(row.result.name for row in self.rows))

    def row(self, condition: str) -> Row | None:
        """The row of a condition."""
        return next((row for row in self.rows if row.condition == condition), None)


def model_name(result: Result) -> str:
    """The base's name without its owner."""
    return result.figures["model"].text.rpartition("/")[2] or result.name


def texts(results: Sequence[Result]) -> list[Group]:
    """The texts before which prompts were read, those with most conditions first."""
    found: dict[str, list[Row]] = {}
    for result in results:
        for text in result.figures["texts"]:
            title = (
                f"{model_name(result)} on {text['data'].text}: the {result.figures['continuation'].number} tokens "
                f"after {text['context'].number}, {text['windows'].number} windows"
            )
            found.setdefault(title, []).extend(_rows(result, text["rows"]))
    return _groups(found, "above_dense")


def answers(results: Sequence[Result]) -> list[Group]:
    """The sets of questions, those with most conditions first."""
    found: dict[str, list[Row]] = {}
    for result in results:
        for key, where in _PLACES:
            about = result.figures[key]
            facts = [f"{about['shots'].number} examples before each"] if about["shots"].number else []
            facts += ["as chat"] if about["form"].text == "chat" else []
            title = ", ".join([f"Answers: {model_name(result)} on {about['data'].text}{where}", *facts])
            found.setdefault(title, []).extend(_rows(result, about["rows"]))
    return _groups(found, "f1_above_dense")


def _rows(result: Result, rows: Node) -> Iterator[Row]:
    named = _full_names(result)
    for node in rows:
        label = node["condition"].text
        if label:
            name = named.get(label, label)
            yield Row(name, _kind(name, label, result), node, result)


def _full_names(result: Result) -> dict[str, str]:
    """Shipped plugins by the label that the command gave them: `--plugin NAME=PLUGIN`."""
    try:
        words = shlex.split(result.root["command"].text)
    except ValueError:
        return {}
    pairs = (word.partition("=") for word in words if "=" in word)
    return {label: plugin for label, _, plugin in pairs if plugin in shipped_plugins()}


def _kind(name: str, label: str, result: Result) -> str:
    if name in (DENSE, ABSENT):
        return name
    if name in shipped_plugins():
        return SHIPPED
    ours = label in result.figures["configs"]
    if "untrained" in label or label.startswith(("mean:", "drop:", "late-skip")):
        return UNTRAINED
    return TRAINED if ours else FOREIGN


def _groups(found: dict[str, list[Row]], distance: str) -> list[Group]:
    groups = [_group(title, rows, distance) for title, rows in found.items() if rows]
    return sorted(groups, key=lambda group: -len(group.rows))


def _group(title: str, rows: Sequence[Row], distance: str) -> Group:
    """Each condition once: where several files have it, the newest."""
    newest: dict[str, Row] = {}
    notes = []
    for row in sorted(rows, key=lambda row: row.result.root["date"].text, reverse=True):
        kept = newest.setdefault(row.condition, row)
        ours, theirs = (each.node[distance].show(".3f") for each in (kept, row))
        if ours and theirs and ours.text != theirs.text:
            notes.append(
                f"{row.condition} is {theirs.text} in {row.result.name}, and {ours.text} in the newer "
                f"{kept.result.name}, which is shown; the older file should say what supersedes it."
            )
    ranks = {DENSE: -1, ABSENT: 1}

    def order(row: Row) -> tuple[int, float]:
        return ranks.get(row.kind, 0), abs(row.node[distance].number or 0.0)

    return Group(title, sorted(newest.values(), key=order), notes)


def frontier_section(results: Sequence[Result], drawings: Drawings) -> Section:
    """Quality against operations and KV entries, and answers."""
    blocks: list[Table | Chart | Missing] = []
    for place, group in enumerate(texts(results)):
        for key, what in (("operations", "compute"), ("kv_entries", "KV memory")):
            blocks.append(_chart(group, key, what, f"{what.split()[0].lower()}-{place}", drawings))
        blocks.append(table(group, _TEXT))
    blocks += [table(group, _ANSWERS) for group in answers(results)]
    if not blocks:
        blocks.append(Missing("Quality against cost", _COMMAND))
    return Section(
        "quality",
        "Quality against cost",
        "The same prompts read in several ways, one drawing for each model and text. Lower left is better: less cost, "
        "less loss. Bars are standard errors; nothing measured is below the dashed line.",
        blocks,
    )


def superseded_tables(result: Result) -> list[Table]:
    """The tables of one result alone."""
    found = [table(group, _TEXT, folded=True) for group in texts([result])]
    return found + [table(group, _ANSWERS, folded=True) for group in answers([result])]


def _chart(group: Group, key: str, what: str, name: str, drawings: Drawings) -> Chart:
    kinds = (SHIPPED, TRAINED, UNTRAINED, FOREIGN)
    drawn: list[tuple[Row, float, float]] = []
    absent: list[tuple[Row, float, float]] = []
    for row in group.rows:
        x, y = row.node[key].number, row.node["above_dense"].number
        if row.kind in kinds and x is not None and y is not None:
            (absent if x >= _SPARED else drawn).append((row, x, y))
    series = []
    for place, kind in enumerate(kinds):
        own = [(row, x, y) for row, x, y in drawn if row.kind == kind]
        if own:
            errors = [row.node["above_dense_error"].number for row, _, _ in own]
            points = [(x, y) for _, x, y in own]
            labels = [row.condition.rpartition("/")[2] for row, _, _ in own]
            series.append(
                Series(kind, points, line=False, colour=place, errors=errors, labels=labels),
            )
    if drawn:
        series.append(Series("dense", [(1.0, 0.0)], line=False, colour=7, labels=["dense"]))
        edge = [*_best([(x, y) for _, x, y in drawn]), (1.0, 0.0)]
        series.append(Series("best so far", edge, steps=True, dashed=True, colour=7))
    axis = {"operations": "operations of reading the prompt", "kv_entries": "KV entries of the prompt"}[key]
    drawing = Drawing(
        name, f"{axis}, of dense", "nats per token above dense", series, linear_below=_LINEAR_BELOW, height=4.4
    )  # fmt: skip
    caption = f"{group.title}. Logarithmic above {_LINEAR_BELOW} nats."
    if absent:
        names = ", ".join(row.condition.rpartition("/")[2] for row, _, _ in absent)
        caption += f" Not drawn, since they spare nothing here: {names}."
    return drawings.chart(drawing, f"Quality against {what}", caption, None, group.files)


def _best(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those than which none costs less and loses no more, by cost."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def table(group: Group, columns: Sequence[tuple[str, str, str, float]], folded: bool = False) -> Table:
    """The numbers of a group."""
    shown = [
        column for column in columns if any(row.node[column[0]].number is not None for row in group.rows)
    ]
    lines: list[list[Cell]] = [
        [row.condition, *(row.node[key].show(form, scale) for key, _, form, scale in shown)]
        for row in group.rows
    ]
    headings = ["", *(heading for _, heading, _, _ in shown)]
    return Table(group.title, headings, lines, group.notes, group.files, folded)
