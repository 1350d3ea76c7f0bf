"""The sections that stand beside the paper: Tables 1 to 8, Figures 3 to 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_variator.measures.paper import paper
from llm_variator.report.blocks import Cell, Chart, Missing, Pair, Paper, Section, Table
from llm_variator.report.charts import Drawing, Series
from llm_variator.report.drawings import Drawings
from llm_variator.report.results import Node, Number, Result

NAMES = {
    "mnli": "MNLI-m",
    "qnli": "QNLI",
    "qqp": "QQP",
    "rte": "RTE",
    "sst2": "SST-2",
    "mrpc": "MRPC",
    "squad": "SQuAD",
}
MEASURES = (("c_and_i_of_i", "chance_i", "|C∩I| / |I|"), ("c_and_u_of_c", "chance_u", "|C∩U| / |C|"))
_NEURONS = (
    "python -m llm_variator.analyze neurons --model smollm2-135m --train-steps 12 "
    "--json eval/results/smollm2-135m-neurons.json"
)
_TABLE_NOTE = (
    "Ours in bold type, in per cent; the paper's own figure, of its own models and training, below it. Parameters and "
    "operations are in per cent of the original model's, by arithmetic."
)


def tables_section(results: Sequence[Result]) -> Section:
    """Tables 1 to 8."""
    blocks: list[Table | Missing] = []
    printed: dict[int, list[Mapping[str, Any]]] = {}
    for table in paper()["tables"]:
        printed.setdefault(table["number"], []).append(table)
    for number in range(1, 9):
        if number == 5:
            blocks += table5(results)
        elif number == 6:
            blocks.append(table6(results))
        else:
            blocks += _numbered(results, number, printed[number])
    return Section(
        "tables",
        "Tables of the paper",
        "Our runs use small models, a fraction of the paper's steps and partly fewer rows: what compares is the "
        "difference between the rows of one table, not a row with the paper's.",
        blocks,
    )


def of_title(results: Sequence[Result], start: str) -> list[Result]:
    """Tables of experiments whose title begins so; tables that only prove that they run are left out."""
    return [
        result
        for result in results
        if result.title.startswith((f"{start}:", f"{start},")) and "smoke" not in result.title
    ]


def _numbered(
    results: Sequence[Result], number: int, printed: Sequence[Mapping[str, Any]]
) -> list[Table | Missing]:
    ours = of_title(results, f"Table {number}")
    found: list[Table | Missing] = []
    if not ours:
        recipe = printed[0]["recipe"]
        command = f"python -m llm_variator.tables recipes/tables/small/{recipe} --data-dir DATA"
        found.append(Missing(f"Table {number}: none of our runs is stored", command))
    beside = []
    for result in ours:
        original = result.figures["paper"]["Original"].value
        matching = [each for each in printed if original and each["rows"].get("Original") == original]
        beside.append((matching or printed)[0])
        found.append(_ours(result, beside[-1]))
    found += [_printed_only(each) for each in printed if each not in beside]
    return found


def _ours(result: Result, printed: Mapping[str, Any]) -> Table:
    """A table of experiments; what has not run yet is missing, and so are rows the recipe lacks."""
    figures, rows = result.figures, printed["rows"]
    cells = figures["cells"]
    columns = list(printed["columns"])
    columns += [task for _, row in cells.items() for task, _ in row.items() if task not in columns]
    columns = list(dict.fromkeys(columns))
    names = list(dict.fromkeys([*rows, *(name for name, _ in cells.items())]))
    with_mean = len(set(columns) & set(NAMES)) == len(NAMES)
    where = f"the paper's Table {printed['number']}, {printed['model']}"

    def beside(row: str, column: str) -> Paper | None:
        text = rows.get(row, {}).get(column)
        return None if text is None else Paper(str(text), where)

    lines: list[list[Cell]] = []
    for name in names:
        line: list[Cell] = [name]
        for task in columns:
            score, spread = (_numbers(cells[name][task][key]) for key in ("score", "spread"))
            line.append(Pair(score, beside(name, task), spread if len(spread) == len(score) else ()))
        if with_mean:
            line.append(_pair(figures["averages"][name].show(".1f"), beside(name, "average")))
        cost = figures["costs"][name]
        for kind in ("parameters", "operations"):
            line.append(_pair(cost[kind].show(".1f"), beside(name, kind)))
        lines.append(line)
    notes = [f"Model: {figures['model'].text or 'not named'}. {_TABLE_NOTE}", *_measured_on(cells)]
    if any(isinstance(cell, Pair) and cell.spread for line in lines for cell in line):
        notes.insert(1, "Behind ±: the standard deviation between adaptations that differ in their seed.")
    head = ["", *(NAMES.get(task, task) for task in columns), *(["average"] if with_mean else [])]
    return Table(result.title, [*head, "parameters", "operations"], lines, notes, [result.name])


def _numbers(metrics: Node) -> list[Number]:
    found = (node.show(".1f") for _, node in metrics.items())
    return [number for number in found if number]


def _pair(ours: Number | None, beside: Paper | None) -> Pair:
    return Pair([ours] if ours else [], beside)


def _measured_on(cells: Node) -> list[str]:
    """Per task what it was measured on and how long the runs trained."""
    found: dict[str, str] = {}
    for _, row in cells.items():
        for task, cell in row.items():
            data, steps = cell["data"]["measured on"].text, cell["steps"].show("d")
            trained = f", {steps.text} steps" if steps else ""
            if data and task not in found:
                found[task] = f"{NAMES.get(task, task)}: measured on {data}{trained}."
    return list(found.values())


def _printed_only(printed: Mapping[str, Any]) -> Table:
    where = f"the paper's Table {printed['number']}, {printed['model']}"
    columns = list(
        dict.fromkeys([*printed["columns"], *(key for row in printed["rows"].values() for key in row)])
    )
    lines: list[list[Cell]] = [
        [name, *(Pair([], Paper(str(row[key]), where) if key in row else None) for key in columns)]
        for name, row in printed["rows"].items()
    ]
    title = f"{printed['title']}, {printed['model']} (the paper's)"
    return Table(title, ["", *(NAMES.get(key, key) for key in columns)], lines, ["Ours: missing."])


def neuron_results(results: Sequence[Result]) -> list[Result]:
    """What `analyze neurons` stored."""
    return [each for each in results if each.figures["sets"].items() and each.figures["activated"].items()]


def table5(results: Sequence[Result]) -> list[Table | Missing]:
    """The sets C, I and U."""
    ours, printed = neuron_results(results), paper()["neurons"]
    ratios = [str(k) for k in printed["ratios"]]
    lines: list[list[Cell]] = []
    for measure, chance, symbol in MEASURES:
        shown = [Paper(f"{value:.2f}", "the paper's Table 5, T5") for value in printed[measure]]
        lines.append([f"{symbol}, paper (T5, ReLU)", *shown])
        for result in ours:
            sets = result.figures["sets"]
            lines.append([f"{symbol}, {_label(result)}", *(sets[k][measure].show(".2f") for k in ratios)])
            lines.append(["by chance alone", *(sets[k][chance].show(".2f") for k in ratios)])
    notes = [
        "Of the k vectors of a group, I are the neurons that all activate in the original model, U those that any "
        "activates; C those that the merged vector activates. By chance: had C been drawn at random, as large as it "
        "is.",
        *(_about(result) for result in ours),
    ]
    title = "Table 5: activated neurons of merged vectors against those of the original"
    table = Table(title, ["", *(f"k={k}" for k in ratios)], lines, notes, [each.name for each in ours])
    if ours:
        return [table]
    command = _NEURONS
    return [table, Missing("Table 5: none of our runs is stored", command)]


def short(result: Result) -> str:
    """The model of a result, by its last name."""
    return result.figures["model"].text.rstrip("/").rpartition("/")[2] or result.name


def _label(result: Result) -> str:
    """The model of an analysis, and whether its plugins were trained."""
    trained = [plugin["training"].text for _, plugin in result.figures["plugins"].items()]
    means = bool(trained) and all(text.startswith("untrained") for text in trained)
    return f"{short(result)}, {'means' if means else 'trained'}"


def _about(result: Result) -> str:
    figures = result.figures
    definition = figures["definition"]
    if definition["name"].text == "nonzero":
        rule = "a neuron is activated where its value is not zero, as in the paper"
    else:
        tolerance = definition["tolerance"].number
        rule = (
            f"gated {definition['activation'].text}: activated where a neuron's contribution reaches its layer's "
            f"threshold, below which all together change the FFN's output by {tolerance}"
        )
    trained = sorted({plugin["training"].text for _, plugin in figures["plugins"].items()})
    return f"{_label(result)}: {rule}. Text {figures['data'].text}; plugins {'; '.join(trained)}."


def table6(results: Sequence[Result]) -> Table:
    """Data sets: the paper's sizes and template, and what ours were measured on."""
    ours: dict[str, list[str]] = {}
    used = []
    for result in results:
        for _, row in result.figures["cells"].items():
            for task, cell in row.items():
                text = cell["data"]["measured on"].text
                if text and "smoke" not in result.title and text not in ours.setdefault(task, []):
                    ours[task].append(text)
                    used.append(result.name)
    where = "the paper's Table 6"
    lines: list[list[Cell]] = [
        [
            NAMES[task],
            Paper(row["train"], where),
            Paper(row["validation"], where),
            "; ".join(ours.get(task, [])) or None,
            Paper(row["template"], where),
        ]
        for task, row in paper()["datasets"].items()
    ]
    title = "Table 6: data sets and templates"
    columns = ["", "train", "validation", "ours measured on", "template"]
    notes = ["Rows and T5 templates as the paper prints them; the library uses these templates."]
    return Table(title, columns, lines, notes, sorted(set(used)))


# --- figures


def figures_section(results: Sequence[Result], drawings: Drawings) -> Section:
    """Figures 3 to 5."""
    blocks: list[Table | Chart | Missing] = []
    said = paper()["said"]
    ours = of_title(results, "Figure 3")
    blocks += [figure3(result, drawings, said["figure3"]) for result in ours]
    if not ours:
        command = "python -m llm_variator.tables recipes/tables/small/figure3.yaml --data-dir DATA"
        blocks.append(Missing(f"Figure 3: quality by compression ratio. {said['figure3']}", command))
    sizes = of_title(results, "Figure 4")
    if sizes:
        blocks.append(figure4(sizes, drawings, said["figure4"]))
    else:
        command = "python -m llm_variator.tables recipes/tables/paper/figure4-base.yaml"
        blocks.append(Missing(f"Figure 4: backbone sizes. {said['figure4']}", command))
    neurons = neuron_results(results)
    if neurons:
        blocks.append(figure5(neurons, drawings, said["figure5"]))
        blocks += [figure5_layers(result, drawings) for result in neurons]
    else:
        command = _NEURONS
        blocks.append(Missing(f"Figure 5: activated neurons. {said['figure5']}", command))
    return Section("figures", "Figures of the paper", "", blocks)


def _score(cell: Node) -> Node:
    """The first metric of a cell."""
    scores = [node for _, node in cell["score"].items()]
    return scores[0] if scores else cell["score"]


def figure3(result: Result, drawings: Drawings, said: str) -> Chart:
    """Score by compression ratio, one line per task, the original dotted."""
    cells = result.figures["cells"]
    ratios = sorted(int(row[2:]) for row, _ in cells.items() if row.startswith("k=") and row[2:].isdigit())
    tasks = list(dict.fromkeys(task for _, row in cells.items() for task, _ in row.items()))
    series, levels, lines = [], [], []
    for place, task in enumerate(tasks):
        name = NAMES.get(task, task)
        values = [(k, _score(cells[f"k={k}"][task]).number) for k in ratios]
        series.append(Series(name, [(k, value) for k, value in values if value is not None]))
        original = _score(cells["Original"][task])
        if original.number is not None:
            levels.append((f"{name}, original", original.number, place))
        row: list[Cell] = [name, original.show(".1f")]
        lines.append([*row, *(_score(cells[f"k={k}"][task]).show(".1f") for k in ratios)])
    drawing = Drawing(
        "figure3", "compression ratio k", "score, %", series, log2=True, levels=levels, ticks=ratios
    )
    table = Table("", ["", "original", *(f"k={k}" for k in ratios)], lines, folded=True)
    return drawings.chart(drawing, result.title, said, table, [result.name])


def figure4(results: Sequence[Result], drawings: Drawings, said: str) -> Chart:
    """Score by size: the original and Variator, one place per model."""
    lines: list[list[Cell]] = []
    points: dict[str, list[tuple[float, float]]] = {"Original": [], "Variator": []}
    for place, result in enumerate(results):
        row: list[Cell] = [short(result)]
        for name, found in points.items():
            columns = [cell for _, cell in result.figures["cells"][name].items()]
            score = _score(columns[0]) if columns else result.figures["cells"][name]
            row.append(score.show(".1f"))
            if score.number is not None:
                found.append((place, score.number))
        lines.append(row)
    series = [Series(name, found) for name, found in points.items()]
    drawing = Drawing("figure4", "models, in the order below", "score, %", series, ticks=range(len(results)))
    table = Table("", ["", *points], lines, folded=True)
    sources = [result.name for result in results]
    return drawings.chart(drawing, "Figure 4: backbone sizes", said, table, sources)


def figure5(results: Sequence[Result], drawings: Drawings, said: str) -> Chart:
    """Share of activated neurons by ratio, one line per model."""
    ratios = sorted(
        {int(k) for result in results for k, _ in result.figures["activated_mean"].items() if k.isdigit()}
    )
    series, lines = [], []
    for result in results:
        means = result.figures["activated_mean"]
        values = [(k, means[str(k)].number) for k in ratios]
        series.append(Series(_label(result), [(k, 100 * value) for k, value in values if value is not None]))
        lines.append([_label(result), *(means[str(k)].show(".2f", 100) for k in ratios)])
    drawing = Drawing(
        "figure5",
        "compression ratio k",
        "activated neurons, %",
        series,
        log2=True,
        from_zero=True,
        ticks=ratios,
    )
    table = Table("per cent", ["", *(f"k={k}" for k in ratios)], lines, folded=True)
    caption = f"Mean over layers; k=1 is the original model. {said}"
    sources = [result.name for result in results]
    return drawings.chart(drawing, "Figure 5: activated neurons", caption, table, sources)


def figure5_layers(result: Result, drawings: Drawings) -> Chart:
    """The same by layer, one line per ratio."""
    series, lines = [], []
    for k, layers in result.figures["activated"].items():
        values = [(place, node.number) for place, node in enumerate(layers)]
        series.append(
            Series(f"k={k}", [(place, 100 * value) for place, value in values if value is not None])
        )
        lines.append([f"k={k}", *(node.show(".1f", 100) for node in layers)])
    drawing = Drawing(
        f"figure5-{drawings.slug(result.name)}", "layer", "activated neurons, %", series, from_zero=True
    )
    width = max((len(line) for line in lines), default=1) - 1
    table = Table("per cent, by layer", ["", *map(str, range(width))], lines, folded=True)
    title = f"Figure 5 by layer: {_label(result)}"
    return drawings.chart(drawing, title, _about(result), table, [result.name])
