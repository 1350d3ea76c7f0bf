"""The frontier's figures as tables, Markdown and a plot. Knows their JSON form and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_variator.measures import plots, tables

TEXT_COLUMNS = (
    "condition", "nats/token", "above dense", "greedy agreement", "same choice",
    "operations", "FFN", "KV entries", "KV bytes", "prefill time",
)  # fmt: skip
ANSWER_COLUMNS = (
    "condition", "exact match", "F1", "above dense", "same answer", "gold nats/token", "above dense",
    "KV entries", "KV bytes",
)  # fmt: skip
PAIR_COLUMNS = ("plugin", "beside", "nats/token", "KV bytes", "KV bytes beside")
PLACES = {
    "questions": "the question in the prompt",
    "hidden_questions": "the question after the prompt, which is read without it",
}
"""Where a table of answers lies in the figures, and what the condition was given to read."""
NOTE = (
    "Above dense: mean of the paired differences and its standard error. Greedy agreement: share of greedy tokens "
    "equal to the dense model's; same choice: given the dense model's tokens before. Gold nats: of the right "
    "answer's tokens, given those before; errors are over the questions. Operations, FFN (with the plugin's own), "
    "KV entries, KV bytes and prefill time are of the dense model's."
)


def text_title(figures: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """What a table of continuations is about."""
    return (
        f"{figures['model']} on {text['data']}: the {figures['continuation']} tokens after {text['context']}, "
        f"{text['windows']} windows, {figures['generate']} greedy tokens"
    )


def answer_title(figures: Mapping[str, Any], key: str) -> str:
    """What a table of answers is about; `key` is one of `PLACES`."""
    about = figures[key]
    shots = f", {about['shots']} examples" if about["shots"] else ""
    return (
        f"{figures['model']} answers {about['data']}; {about['form']}{shots}, "
        f"{about['mean_prompt_tokens']:.0f} prompt tokens, {PLACES[key]}"
    )


def text_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of `TEXT_COLUMNS`."""
    return [
        row["condition"],
        f"{row['cross_entropy']:.4f}",
        _difference(row["above_dense"], row["above_dense_error"], 4),
        f"{row['greedy_agreement']:.1%}",
        f"{row['same_choice']:.1%}",
        f"{row['operations']:.3f}",
        f"{row['ffn_operations']:.3f}",
        f"{row['kv_entries']:.3f}",
        f"{row['kv_bytes']:.3f}",
        "-" if row["prefill"] is None else f"{row['prefill']:.2f}",
    ]


def answer_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of `ANSWER_COLUMNS`."""
    return [
        row["condition"],
        f"{row['exact_match']:.1f}",
        f"{row['f1']:.1f}",
        _difference(row["f1_above_dense"], row["f1_above_dense_error"], 1),
        f"{row['same_answer']:.0f}%",
        f"{row['gold_nats']:.3f}",
        _difference(row["gold_above_dense"], row["gold_above_dense_error"], 3),
        f"{row['kv_entries']:.3f}",
        f"{row['kv_bytes']:.3f}",
    ]


def pair_cells(row: Mapping[str, Any]) -> list[str]:
    """One row of `PAIR_COLUMNS`."""
    return [
        row["condition"],
        row["other"],
        _difference(row["nats"], row["nats_error"], 4),
        f"{row['kv_bytes']:.3f}",
        f"{row['other_kv_bytes']:.3f}",
    ]


def print_tables(figures: Mapping[str, Any]) -> None:
    """All tables, to stdout."""
    for title, columns, rows in _tables(figures):
        tables.show(title, [column.replace(" ", "\n", 1) for column in columns], rows)
    Console().print(NOTE, style="dim", highlight=False)


def markdown(figures: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [
        f"{title}\n\n{tables.markdown(columns, rows, '---:')}" for title, columns, rows in _tables(figures)
    ]
    return "\n\n".join([*parts, NOTE]) + "\n"


def plot(path: Path, figures: Mapping[str, Any]) -> None:
    """Draw nats above dense against measured prefill time, counted operations and KV bytes, a row per text.

    Raises:
        VariatorError: matplotlib is missing, the suffix is none of its formats, or the file cannot be written.
    """
    matplotlib = plots.matplotlib()
    texts = figures["texts"]
    axes_of = {"operations": "operations of the prefill, of dense", "kv_bytes": "KV bytes, of dense"}
    if all(text["rows"][0]["prefill"] is not None for text in texts):
        axes_of = {"prefill": "measured prefill time, of dense", **axes_of}
    size = (4.5 * len(axes_of), 3.6 * len(texts) + 1.2)
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(texts), len(axes_of), squeeze=False)
    colours = matplotlib.colormaps["tab10"]
    for text, line in zip(texts, grid, strict=True):
        rows = text["rows"]
        absent = next((row["above_dense"] for row in rows if row["condition"] == "no context"), None)
        for (figure_name, label), axes in zip(axes_of.items(), line, strict=True):
            for number, row in enumerate(rows):
                if row["condition"] == "no context" or row[figure_name] is None:
                    continue  # far above all others: it is named in the title
                axes.errorbar(
                    row[figure_name], row["above_dense"], yerr=row["above_dense_error"],
                    fmt="osD^vP*X"[number % 8], color=colours(number % 10), capsize=2, label=row["condition"],
                )  # fmt: skip
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xlabel(label)
            axes.set_xlim(0, 1.06 * max(1.0, *(row[figure_name] or 0 for row in rows)))
            axes.grid(alpha=0.3)
        line[0].set_ylabel("nats per token above dense")
        aside = "" if absent is None else f" (no context: {absent:+.2f})"
        line[0].set_title(f"{text['data']}, {text['context']} tokens{aside}", loc="left")
    handles, labels = grid[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(axes_of) + 1)
    plots.save(figure, path, dpi=120)


def _tables(figures: Mapping[str, Any]) -> Iterable[tuple[str, Sequence[str], list[list[str]]]]:
    for text in figures["texts"]:
        title = text_title(figures, text)
        yield title, TEXT_COLUMNS, [text_cells(row) for row in text["rows"]]
        yield from _pairs(title, text)
    for key in PLACES:
        if key in figures:
            title, answers = answer_title(figures, key), figures[key]
            yield title, ANSWER_COLUMNS, [answer_cells(row) for row in answers["rows"]]
            yield from _pairs(title, answers)


def _pairs(title: str, figures: Mapping[str, Any]) -> Iterable[tuple[str, Sequence[str], list[list[str]]]]:
    if pairs := figures.get("pairs"):  # stored figures of before have none
        yield f"{title}: plugins less others of about as many bytes", PAIR_COLUMNS, [*map(pair_cells, pairs)]


def _difference(value: float, error: float | None, digits: int) -> str:
    around = "" if error is None else f" ±{error:.{digits}f}"
    return f"{value:+.{digits}f}{around}"
