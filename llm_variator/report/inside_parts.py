"""What plugins have learned, from `analyze merge`; results that no other section shows; superseded ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from llm_variator.report.blocks import Cell, Chart, Missing, Section, Table
from llm_variator.report.charts import Drawing, Series
from llm_variator.report.drawings import Drawings
from llm_variator.report.frontier_parts import superseded_tables
from llm_variator.report.results import Node, Number, Result

_COMMAND = "python -m llm_variator.analyze merge --model smollm2-135m --plugin runs/k2 --json eval/results/merge.json"
_NO_RESULTS = ("config", "configs", "held_out_history", "loss_history")
_MOST = 40  # numbers of a file that nothing else shows


def inside_section(results: Sequence[Result], drawings: Drawings) -> Section:
    """Merge weights, reconstruction, sensitivity, and the tokens that lose most."""
    blocks: list[Table | Chart | Missing] = []
    for result in results:
        if result.figures["weights"].items():
            blocks += _merge(result, drawings)
    if not blocks:
        blocks.append(Missing("What a plugin has learned", _COMMAND))
    lead = "What training made of a shipped plugin, layer by layer, and which tokens pay for the compression."
    return Section("inside", "Inside a plugin", lead, blocks)


def _merge(result: Result, drawings: Drawings) -> list[Table | Chart | Missing]:
    figures, slug = result.figures, drawings.slug(result.name)
    name = figures["plugin"].text
    blocks: list[Table | Chart | Missing] = []
    weights = []
    for site, layers in figures["weights"].items():
        points = _points(layers, lambda each: each["mean"].last)
        weights.append(Series(f"{site}, last token", points))
    drawing = Drawing(f"weights-{slug}", "layer", "merge weight", weights, levels=[("a mean of two", 0.5, 7)])
    wins = [
        [f"{site}: groups in which the last token weighs most, %", each.show(".1f", 100)]
        for site, each in figures["last_wins"].items()
    ]
    caption = "Mean learned weight of the last token of a group. " + name
    blocks.append(
        drawings.chart(drawing, "Does the last token win?", caption, Table("", ["", ""], wins), [result.name])
    )
    errors = []
    for key, label in (("restored", "as restored"), ("copied", "had it been copied")):
        errors.append(Series(label, _points(figures["reconstruction"], lambda each, key=key: each[key])))
    drawing = Drawing(f"restored-{slug}", "layer", "relative error", errors, from_zero=True)
    caption = (
        "Length of the error of an FFN's restored output over that of the frozen FFN on the token itself, given the "
        "same input. Training minimises the error at the end of the model, not this one."
    )
    blocks.append(drawings.chart(drawing, "Reconstruction by layer", caption, None, [result.name]))
    drifts = [
        Series(
            f"{part} tokens",
            [(place, node.number) for place, node in enumerate(layers) if node.number is not None],
        )
        for part, layers in figures["drift"].items()
    ]
    drawing = Drawing(f"drift-{slug}", "layer", "relative distance", drifts, from_zero=True)
    caption = "How far a layer's output is from the dense model's: errors of all layers before it add up."
    blocks.append(drawings.chart(drawing, "Distance from the dense model", caption, None, [result.name]))
    harms = []
    for site, found in figures["sensitivity"].items():
        points = [(place, node.number) for place, node in enumerate(found["divergence"]) if node.number]
        harms.append(Series(f"{site}, k={found['k'].number}", [(x, y) for x, y in points if y is not None]))
    if harms:
        drawing = Drawing(f"sensitivity-{slug}", "layer", "nats from dense", harms, logy=True)
        caption = "Divergence of the predictions when this layer alone is merged, by means, without training."
        blocks.append(drawings.chart(drawing, "Sensitivity of each layer", caption, None, [result.name]))
    else:
        blocks.append(Missing("Sensitivity of each layer", _COMMAND))
    blocks.append(_layers(result))
    blocks += _tokens(result)
    return blocks


def _points(layers: Node, get: object) -> list[tuple[float, float]]:
    assert callable(get)
    found = [(int(layer), get(each).number) for layer, each in layers.items() if layer.isdigit()]
    return [(layer, value) for layer, value in found if value is not None]


def _layers(result: Result) -> Table:
    """The numbers of all four drawings."""
    figures = result.figures
    sites = [site for site, _ in figures["weights"].items()]
    harmed = [site for site, _ in figures["sensitivity"].items()]
    count = figures["drift"]["merged"].size or 1 + max(
        (int(layer) for site in sites for layer, _ in figures["weights"][site].items() if layer.isdigit()),
        default=0,
    )
    lines: list[list[Cell]] = []
    for layer in range(count):
        row: list[Cell] = [str(layer)]
        for site in sites:
            own = figures["weights"][site][str(layer)]["mean"]
            row.append(own.last.show())
        found = figures["reconstruction"][str(layer)]
        row += [found["restored"].show(), found["copied"].show()]
        row += [figures["drift"][part][layer].show() for part in ("merged", "dense")]
        row += [figures["sensitivity"][site]["divergence"][layer].show(".5f") for site in harmed]
        lines.append(row)
    columns = [
        "layer",
        *(f"{site} weight" for site in sites),
        "restored",
        "copied",
        "distance, merged",
        "dense",
    ]
    columns += [f"{site} alone, nats" for site in harmed]
    return Table("The numbers by layer", columns, lines, (), [result.name], folded=True)


def _tokens(result: Result) -> list[Table | Chart | Missing]:
    tokens = result.figures["tokens"]
    blocks: list[Table | Chart | Missing] = []
    kinds = (
        ("by_origin", "Which tokens suffer: where they occurred before"),
        ("by_shape", "Which tokens suffer: what they look like"),
        ("by_token", "Which tokens suffer: single tokens, five or more of each"),
    )
    for key, title in kinds:
        lines: list[list[Cell]] = [
            [
                row["kind"].text.replace(" ", "␣") if key == "by_token" else row["kind"].text,
                row["tokens"].show("d"),
                *(row[name].show() for name in ("dense", "compressed")),
                row["harm"].show("+.3f"),
            ]
            for row in tokens[key]
        ]
        if lines:
            columns = ["", "tokens", "dense, nats", "compressed", "difference"]
            blocks.append(Table(title, columns, lines, (), [result.name], folded=key == "by_token"))
    lines = [
        [
            f"…{row['before'].text}",
            row["token"].text.replace(" ", "␣"),
            row["dense"].show(),
            row["compressed"].show(),
        ]
        for row in tokens["examples"]
    ]
    if lines:
        columns = ["text before", "token", "dense, nats", "compressed"]
        blocks.append(Table("The worst places", columns, lines, (), [result.name], folded=True))
    return blocks


def rest_section(results: Sequence[Result], shown: Collection[str]) -> Section | None:
    """Numbers of files that no section shows."""
    blocks: list[Table | Chart | Missing] = []
    for result in results:
        if result.name not in shown:
            blocks += _leftovers(result)
    if not blocks:
        return None
    return Section(
        "rest", "Further results", "Contexts, serving, training runs and checks, as stored.", blocks
    )


def _leftovers(result: Result) -> list[Table]:
    """The numbers of one file by their names in it; none for a file without numbers."""
    numbers = _numbers(result.figures, ())
    if not numbers:
        return []
    lines: list[list[Cell]] = [[name, number] for name, number in numbers[:_MOST]]
    more = len(numbers) - _MOST
    notes = [f"{more} further numbers are in the file."] if more > 0 else []
    return [Table(result.name.removesuffix(".json"), ["", ""], lines, notes, [result.name], folded=True)]


def superseded_section(results: Sequence[Result]) -> Section:
    """What newer files replace, each with the file that holds now."""
    blocks: list[Table | Chart | Missing] = []
    for result in results:
        if result.superseded_by:
            note = f"Superseded by {result.superseded_by}."
            for each in superseded_tables(result) or _leftovers(result):
                blocks.append(dataclasses.replace(each, notes=[note, *each.notes]))
    lead = "Measured on plugins or code that newer results replace. Nothing above takes a number from here."
    return Section("superseded", "Superseded", lead, blocks)


def _numbers(node: Node, path: tuple[str, ...]) -> list[tuple[str, Number]]:
    """All numbers under a node, with the names on the way; configurations are no results."""
    if (number := node.show("g")) is not None:
        return [(", ".join(path).replace("_", " "), number)]
    if len(path) > 6:
        return []
    pairs = node.items() or [(str(place), each) for place, each in enumerate(node)]
    return [
        each for name, child in pairs if name not in _NO_RESULTS for each in _numbers(child, (*path, name))
    ]
