"""The sections for choosing a ratio: tasks, speed against its bound, operations."""

from __future__ import annotations

from collections.abc import Sequence

from llm_variator.bench.report import COLUMNS
from llm_variator.report.blocks import Cell, Chart, Missing, Section, Table
from llm_variator.report.charts import Drawing, Series
from llm_variator.report.drawings import Drawings
from llm_variator.report.frontier_parts import model_name
from llm_variator.report.results import Node, Result

_MANY_TASKS = 6


def tasks_section(results: Sequence[Result]) -> Section:
    """lm-eval's tasks side by side."""
    blocks: list[Table | Chart | Missing] = []
    offline = [result for result in results if list(result.figures["quality"])]
    offline.sort(key=lambda result: -result.figures["quality"].size)
    for result in offline:
        blocks.append(_quality(result))
        if list(result.figures["prefill"]):
            blocks.append(_prefill(result))
    if not offline:
        blocks.append(Missing("lm-eval's tasks side by side", "make suite DATA=DIR"))
    return Section("tasks", "Tasks of lm-eval", "Plugins side by side, each item prompted once.", blocks)


def _quality(result: Result) -> Table:
    """Tasks of lm-eval, one column per plugin."""
    figures = result.figures
    labels = list(dict.fromkeys(label for row in figures["quality"] for label, _ in row["values"].items()))
    lines: list[list[Cell]] = []
    for row in figures["quality"]:
        better = "" if row["higher_is_better"].value else " (less is better)"
        name = f"{row['task'].text.removeprefix('variator_')}, {row['metric'].text}{better}"
        lines.append([name, row["items"].show("d"), *(row["values"][label].show(".3f") for label in labels)])
    notes = [f"{label}: {entry.text}" for label, entry in figures["entries"].items()]
    title = f"lm-eval's tasks: {model_name(result)} ({result.name.removesuffix('.json')})"
    few = len(lines) < _MANY_TASKS
    return Table(title, ["", "items", *labels], lines, notes, [result.name], folded=few)


def _prefill(result: Result) -> Table:
    prefill = result.figures["prefill"]
    labels = list(dict.fromkeys(label for row in prefill for label, _ in row["seconds"].items()))
    lines: list[list[Cell]] = []
    for row in prefill:
        tokens = row["tokens"].number
        cells = (row["seconds"][label].show(",.0f", 1e3) for label in labels)
        lines.append([f"prefill of {tokens} tokens, ms", *cells])
        if row["kv_bytes"].items():
            cells = (row["kv_bytes"][label].show(".2f", 2**-20) for label in labels)
            lines.append(["its KV cache, MiB", *cells])
    title = f"Time and memory of a prompt: {model_name(result)}"
    return Table(title, ["", *labels], lines, ["Medians of reads in turns."], [result.name])


def speed_section(results: Sequence[Result], drawings: Drawings) -> Section:
    """Measured speed beside its bound."""
    blocks: list[Table | Chart | Missing] = []
    for result in results:
        rows = [row for row in result.figures["rows"] if "case" in row and "of_dense" in row]
        if rows:
            blocks += _bench(result, rows, drawings)
    if not blocks:
        for command in ("prefill", "decode"):
            words = f"python -m llm_variator.bench {command} --json eval/results/NAME.json"
            blocks.append(Missing(f"Speed against bound: bench {command}", words))
    return Section(
        "speed",
        "Speed against its bound",
        "Time over the dense time of the same repetition: medians, quartiles shaded; dashed, what the remaining "
        "operations (prefill) or bytes (decoding) allow.",
        blocks,
    )


def _bench(result: Result, rows: Sequence[Node], drawings: Drawings) -> list[Table | Chart | Missing]:
    figures = result.figures
    facts = [f"{figures['layers'].number} layers" if figures["layers"].number else "", figures["dtype"].text]
    about = ", ".join(filter(None, [model_name(result), *facts, figures["device"].text]))
    title = f"{about} ({result.name.removesuffix('.json')})"
    shown = [name for name in COLUMNS if any(row[name].value is not None for row in rows)]
    lines: list[list[Cell]] = [
        [row[name].text if COLUMNS[name][1] == "s" else row[name].show(COLUMNS[name][1]) for name in shown]
        for row in rows
    ]
    table = Table(title, [COLUMNS[name][0] for name in shown], lines, (), [result.name])
    groups: dict[tuple[str, float | None], list[Node]] = {}
    for row in rows:
        if (
            row["tokens"].number is not None
            and row["of_dense"].number is not None
            and row["case"].text != "dense"
        ):
            groups.setdefault((row["case"].text, row["batch"].number), []).append(row)
    if not any(len(group) > 1 for group in groups.values()):
        return [table]
    batches = {batch for _, batch in groups}
    series = []
    for place, ((case, batch), group) in enumerate(groups.items()):
        label = case if len(batches) < 2 else f"{case}, batch {batch}"
        points = [(row["tokens"].number or 0.0, row["of_dense"].number or 0.0) for row in group]
        low, high = ([row[f"of_dense_{end}"].number for row in group] for end in ("low", "high"))
        whole = None not in low and None not in high
        ends = ([v for v in low if v is not None], [v for v in high if v is not None]) if whole else ((), ())
        series.append(Series(label, points, low=ends[0], high=ends[1], colour=place))
        bound = [(row["tokens"].number or 0.0, row["bound"].number) for row in group]
        if all(value is not None for _, value in bound):
            line = [(x, value) for x, value in bound if value is not None]
            series.append(Series(f"{label}, bound", line, dashed=True, colour=place))
    ticks = sorted({row["tokens"].number or 0 for group in groups.values() for row in group})
    drawing = Drawing(
        f"bench-{drawings.slug(result.name)}",
        "tokens",
        "time, of dense",
        series,
        log2=True,
        from_zero=True,
        ticks=ticks,
    )
    return [drawings.chart(drawing, title, figures["model"].text, None, [result.name]), table]


def operations_section(results: Sequence[Result]) -> Section:
    """By arithmetic: what a prompt costs."""
    blocks: list[Table | Chart | Missing] = []
    for result in results:
        lines: list[list[Cell]] = []
        for tokens, conditions in result.figures["prompts"].items():
            for name, costs in conditions.items():
                if costs["total"].number is not None:
                    entries = costs["cache_entries"].show(",d") if costs["cache_entries"].number else None
                    giga = (costs[part].show(",.1f", 1e-9) for part in ("total", "ffn", "plugin"))
                    lines.append([f"{tokens} tokens, {name}", *giga, entries])
        if lines:
            k = result.figures["config"]["k"].number
            sites = ", ".join(site.text for site in result.figures["config"]["sites"])
            title = f"{model_name(result)}, k={k}, {sites}"
            columns = ["", "giga-operations", "of them FFN", "plugin", "KV entries"]
            blocks.append(Table(title, columns, lines, (), [result.name]))
    if not blocks:
        words = (
            "python -m llm_variator.flops --model llama-7b --k 2 --sites ffn,kv --json eval/results/NAME.json"
        )
        blocks.append(Missing("Operations by arithmetic", words))
    return Section(
        "operations",
        "Operations by arithmetic",
        "What reading a prompt costs, counted, not measured.",
        blocks,
    )
