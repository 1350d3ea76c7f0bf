"""The sections for choosing a ratio: quality against cost, tasks, speed against its bound, operations."""

from __future__ import annotations

from collections.abc import Sequence

from llm_variator.bench.report import COLUMNS
from llm_variator.report.blocks import Card, Cell, Chart, Missing, Section, Table
from llm_variator.report.charts import Drawing, Series
from llm_variator.report.drawings import Drawings
from llm_variator.report.results import Node, Result

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
_MANY_TASKS = 6
_FRONTIER = (
    "python -m llm_variator.evaluate frontier --model smollm2-135m --plugin smollm2-135m/k2 "
    "--json eval/results/smollm2-135m-frontier.json"
)


def cards(results: Sequence[Result]) -> list[Card]:
    """What the shipped plugin saves and costs, from the frontier of texts and of answers."""
    found: list[Card] = []
    for result in results:
        for text in result.figures["texts"]:
            for row in text["rows"]:
                name = row["condition"].text
                if name not in result.figures["configs"] or "untrained" in name or "/" not in name:
                    continue
                about = f"{name}, the {result.figures['continuation'].number} tokens after {text['context'].number}"
                wanted = (
                    ("KV entries of the prompt", row["kv_entries"].show(".0%"), f"of dense; {about}"),
                    ("operations of reading it", row["operations"].show(".0%"), f"of dense; {about}"),
                    (
                        "loss of the text after it",
                        row["above_dense"].show("+.3f"),
                        f"nats above dense; {about}",
                    ),
                    ("next tokens chosen as dense", row["same_choice"].show(".0%"), about),
                )
                found += [Card(label, number, note) for label, number, note in wanted if number]
        answers = result.figures["questions"]
        dense = [row["f1"].show(".1f") for row in answers["rows"] if row["condition"].text == "dense"]
        for row in answers["rows"]:
            name, number = row["condition"].text, row["f1"].show(".1f")
            if number and "/" in name and "untrained" not in name:
                note = f"{name}, {answers['data'].text}"
                found.append(Card("F1 of answers copied from it", number, note, dense[0] if dense else None))
    return sorted(found, key=lambda card: card.dense is not None)[:5]


def frontier_section(results: Sequence[Result], drawings: Drawings) -> Section:
    """Quality against operations and KV entries; answers; lm-eval's tasks side by side."""
    blocks: list[Table | Chart | Missing] = []
    for result in results:
        for place, text in enumerate(result.figures["texts"]):
            if list(text["rows"]):
                blocks += _text(result, text, place, drawings)
    for result in results:
        for key, where in (("questions", ""), ("hidden_questions", ", the question after the prompt")):
            rows = result.figures[key]["rows"]
            if list(rows):
                title = f"Answers: {_model(result)} on {result.figures[key]['data'].text}{where}"
                blocks.append(_rows(title, rows, _ANSWERS, result))
    if not blocks:
        blocks.append(Missing("Quality against cost", _FRONTIER))
    offline = [result for result in results if list(result.figures["quality"])]
    offline.sort(key=lambda result: -result.figures["quality"].size)
    for result in offline:
        blocks.append(_quality(result))
        if list(result.figures["prefill"]):
            blocks.append(_prefill(result))
    if not offline:
        blocks.append(Missing("lm-eval's tasks side by side", "make suite DATA=DIR"))
    return Section(
        "quality",
        "Quality against cost",
        "The same prompts read in several ways. Lower left is better in the drawings: less cost, less loss.",
        blocks,
    )


def _model(result: Result) -> str:
    return result.figures["model"].text.rpartition("/")[2] or result.name


def _text(result: Result, text: Node, place: int, drawings: Drawings) -> list[Table | Chart | Missing]:
    rows = list(text["rows"])
    about = (
        f"{_model(result)} on {text['data'].text}: the {result.figures['continuation'].number} tokens after "
        f"{text['context'].number}, {text['windows'].number} windows"
    )
    blocks: list[Table | Chart | Missing] = []
    for key, heading, what in (
        ("operations", "operations of reading the prompt, of dense", "compute"),
        ("kv_entries", "KV entries of the prompt, of dense", "KV memory"),
    ):
        series = []
        for row in rows:
            x, y = row[key].number, row["above_dense"].number
            if x is not None and y is not None and row["condition"].text != "no context":
                series.append(Series(row["condition"].text, [(x, y)], line=False))
        name = f"{'compute' if key == 'operations' else 'kv'}-{drawings.slug(result.name)}-{place}"
        drawing = Drawing(name, heading, "nats per token above dense", series)
        caption = f"{about}. A prompt left out altogether (no context) would stand far above; see the table."
        blocks.append(drawings.chart(drawing, f"Quality against {what}", caption, None, [result.name]))
    return [*blocks, _rows(about, text["rows"], _TEXT, result)]


def _rows(title: str, rows: Node, columns: Sequence[tuple[str, str, str, float]], result: Result) -> Table:
    shown = [column for column in columns if any(row[column[0]].number is not None for row in rows)]
    lines: list[list[Cell]] = [
        [row["condition"].text or "?", *(row[key].show(form, scale) for key, _, form, scale in shown)]
        for row in rows
    ]
    return Table(title, ["", *(heading for _, heading, _, _ in shown)], lines, (), [result.name])


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
    title = f"lm-eval's tasks: {_model(result)} ({result.name.removesuffix('.json')})"
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
    title = f"Time and memory of a prompt: {_model(result)}"
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
    about = ", ".join(filter(None, [_model(result), *facts, figures["device"].text]))
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
            title = f"{_model(result)}, k={k}, {sites}"
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
