"""Plugins side by side: quality by lm-eval, measured prefill time and KV bytes, as a table, JSON and a plot."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import hashlib
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llm_variator.compare import DENSE
from llm_variator.corpora import EMBEDDED, read_windows
from llm_variator.errors import VariatorError
from llm_variator.files import write_atomically
from llm_variator.loading import load_config, model_source, shipped_plugins
from llm_variator.model import VariatorModel
from llm_variator.results import write_result

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

    @property
    def described(self) -> str:
        """What it is, in words."""
        if self.k is not None:
            return f"untrained, means, k={self.k}"
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


def parse_entries(text: str, model: str) -> list[Entry]:
    """`none,k2,mine=runs/k4,k4=4` -> entries.

    Raises:
        VariatorError: an empty list, a label twice, or a name that is no plugin's.
    """
    entries = [_parse_entry(part.strip(), model) for part in text.split(",") if part.strip()]
    labels = [entry.label for entry in entries]
    if not entries or len(set(labels)) != len(labels):
        raise VariatorError(f"--compare {text!r}: give at least one entry, and every label once")
    return entries


def _parse_entry(part: str, model: str) -> Entry:
    label, given, value = part.partition("=")
    if part in (DENSE, HF):
        return Entry(part)
    if given and value.isdigit():
        if int(value) < 1:
            raise VariatorError(f"--compare {part!r}: the ratio must be at least 1")
        return Entry(label, k=int(value))
    name = value if given else label
    shipped = shipped_plugins()
    if f"{model}/{name}" in shipped:
        return Entry(label, plugin=f"{model}/{name}")
    if name in shipped or Path(name).expanduser().is_dir() or "/" in name:
        return Entry(label if given else Path(name).name, plugin=name)
    raise VariatorError(
        f"--compare: no plugin {name!r} is shipped for {model} (shipped are: {', '.join(shipped)}); write "
        f"{label}=FOLDER for one of yours, or {label}=K for an untrained one of ratio K"
    )


def main(args: argparse.Namespace, ours: Mapping[str, Any], *, argv: Sequence[str], started: float) -> None:
    """Evaluate every entry, measure, print and store.

    Args:
        args: lm-eval's flags; `model` is a base model.
        ours: the flags `compare`, `prompt_tokens` and `repetitions`.
        argv: the whole command line, for the stored result.
        started: `time.perf_counter()` at the start.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from llm_variator.integrations import harness

    model, entries = args.model, parse_entries(ours["compare"], args.model)
    if args.use_cache:
        raise VariatorError(
            "--use_cache knows requests, not plugins: all columns would be the same; leave it out"
        )
    if output := args.output_path:
        output = Path(output)
        if output.suffix != ".json":
            raise VariatorError(f"--output_path {output}: with --compare give a file that ends in .json")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about flags that are meant here
    seq2seq = load_config(model).is_encoder_decoder
    args.model = "variator-seq2seq" if seq2seq else "variator"
    args.model_args = {**(args.model_args or {}), "pretrained": model}
    config = EvaluatorConfig.from_cli(args)
    options = {name: value for name, value in config.model_args.items() if name != "pretrained"}
    options |= dict(batch_size=config.batch_size, max_batch_size=config.max_batch_size, device=config.device)

    console = Console()
    tasks = config.process_tasks(config.metadata)
    kind = harness.VariatorSeq2SeqLM if seq2seq else harness.VariatorLM
    lm = kind(model, **options)
    for entry in entries:
        if entry.plugin:
            lm.variator.load_plugin(entry.plugin, entry.label)
        elif entry.k is not None:
            lm.variator.add_plugin(entry.label, harness.mean_config(entry.k))
    runs: dict[str, dict[str, Any]] = {}
    for entry in entries:
        console.print(f"== {entry.label}: {entry.described}", highlight=False)
        begun = time.perf_counter()
        if entry.label == HF:
            theirs = {name: value for name, value in options.items() if not name.startswith("rolling_")}
            runs[HF] = _evaluate(harness.HFLM(model_source(model), **theirs), config, tasks)
            gc.collect()
        else:
            lm.variator.set_plugin(None if entry.label == DENSE else entry.label)
            runs[entry.label] = _evaluate(lm, config, tasks)
        runs[entry.label]["seconds"] = time.perf_counter() - begun
    lm.variator.set_plugin(None)
    names = {
        entry.label: None if entry.label == DENSE else entry.label for entry in entries if entry.label != HF
    }
    prefill = []
    if repetitions := ours["repetitions"]:
        windows = read_windows(EMBEDDED, lm.tokenizer, seq_length=max(ours["prompt_tokens"]))
        prefill = [
            measure_prefill(lm.variator, names, windows[:1, :tokens].to(lm.device), repetitions)
            for tokens in ours["prompt_tokens"]
        ]
    quality = quality_rows(runs)
    show(console, quality, prefill, model)
    if output:
        figures = {
            "model": model,
            "entries": {entry.label: entry.described for entry in entries},
            "configs": {name: made.to_dict() for name, made in lm.variator.plugins.items()},
            "limit": config.limit,
            "batch_size": config.batch_size,
            "quality": [dataclasses.asdict(row) for row in quality],
            "agreement": agreement(runs),
            "prefill": [dataclasses.asdict(row) for row in prefill],
            "evaluation_seconds": {label: run["seconds"] for label, run in runs.items()},
        }
        words = ["llm_variator.evaluate", "harness", *argv]
        write_result(
            output, figures, command=words, seed=config.seed[0] if config.seed else None, started=started
        )
        write_atomically(output.with_suffix(".md"), markdown(quality, prefill, model, entries))
        write_atomically(output.with_suffix(".png"), lambda path: plot(path, quality, prefill, model))
        console.print(f"stored in {output}, with .md and .png", highlight=False)


def _evaluate(lm: Any, config: Any, task_manager: Any) -> dict[str, Any]:
    """lm-eval's results for one model, samples included."""
    from lm_eval import simple_evaluate

    seeds = config.seed or [None] * 4
    results = simple_evaluate(
        lm,
        tasks=config.tasks,
        task_manager=task_manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        samples=config.samples,
        log_samples=True,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        gen_kwargs=config.gen_kwargs,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        bootstrap_iters=0,
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
    )
    assert results is not None
    return dict(results)


def quality_rows(runs: Mapping[str, Mapping[str, Any]]) -> list[Quality]:
    """One row per task and metric, in lm-eval's order; groups are left to their tasks."""
    first = next(iter(runs.values()))
    rows = []
    for task, samples in first["samples"].items():
        for key in first["results"][task]:
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr"):
                continue
            values = {label: float(run["results"][task][key]) for label, run in runs.items()}
            stderr = {
                label: _number(run["results"][task].get(f"{metric}_stderr,{name}"))
                for label, run in runs.items()
            }
            documents = {sample["doc_id"]: sample["doc"] for sample in samples}
            rows.append(
                Quality(
                    task,
                    metric if name == "none" else f"{metric} ({name})",
                    bool(first["higher_is_better"].get(task, {}).get(metric, True)),
                    len(documents),
                    next(iter(documents.values())).get("data"),
                    values,
                    stderr,
                )
            )
    return rows


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def agreement(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Per task and label, how the answers compare with the first column's.

    `largest_difference` of a log-likelihood in nats, None for generated text; `equal` answers of `answers` (to the
    last bit); `digest` of them all: equal digests are equal answers.
    """
    first = next(iter(runs.values()))
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for task in first["samples"]:
        reference = _answers(first, task)
        table[task] = {}
        for label, run in runs.items():
            own = _answers(run, task)
            pairs = list(zip(own, reference, strict=True))
            gaps = [abs(ours[0] - theirs[0]) for ours, theirs in pairs if not isinstance(ours, str)]
            table[task][label] = {
                "answers": len(own),
                "equal": sum(ours == theirs for ours, theirs in pairs),
                "largest_difference": max(gaps) if gaps else None,
                "digest": hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16],
            }
    return table


def _answers(run: Mapping[str, Any], task: str) -> list[Any]:
    """Generated texts, or (log-likelihood, greedy), in the order of the documents."""
    samples = sorted(run["samples"][task], key=lambda sample: (sample["doc_id"], sample["filter"]))
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    return [answer if isinstance(answer, str) else tuple(answer) for answer in answers]


@torch.inference_mode()
def measure_prefill(
    model: VariatorModel, names: Mapping[str, str | None], prompt: Tensor, repetitions: int
) -> Prefill:
    """Time and KV bytes of reading a prompt (1, tokens) with each plugin.

    The repetitions are taken in turns, so that a machine that slows down does so for all alike; the first call
    of each is not timed. Of T5 the encoder is measured, with one token of the decoder.
    """
    seq2seq = model.config.is_encoder_decoder
    given: dict[str, Any] = (
        dict(decoder_input_ids=torch.zeros_like(prompt[:, :1]), use_cache=False)
        if seq2seq
        else dict(logits_to_keep=1, use_cache=True)
    )
    prompt = prompt.long()
    times: dict[str, list[float]] = {label: [] for label in names}
    held: dict[str, int] = {}
    for turn in range(repetitions + 1):
        for label, name in names.items():
            with model.use_plugin(name):
                _wait(prompt.device)
                begun = time.perf_counter()
                output = model(prompt, **given)
                _wait(prompt.device)
                if turn:
                    times[label].append(time.perf_counter() - begun)
                elif not seq2seq:
                    held[label] = model.kv_cache_report(output.past_key_values).bytes
            del output
    seconds = {label: statistics.median(own) for label, own in times.items()}
    return Prefill(prompt.shape[1], seconds, None if seq2seq else held)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- showing


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


def show(console: Console, quality: Sequence[Quality], prefill: Sequence[Prefill], model: str) -> None:
    """Print the table."""
    shown = Table(title=model)
    shown.add_column("")
    for label in quality[0].values:
        shown.add_column(label, justify="right")
    for cells in _cells(quality, prefill):
        shown.add_row(*cells)
    console.print(shown)


def markdown(
    quality: Sequence[Quality], prefill: Sequence[Prefill], model: str, entries: Sequence[Entry]
) -> str:
    """The table as a Markdown document."""
    labels = list(quality[0].values)
    lines = [
        f"# {model}: plugins side by side",
        "",
        "| | " + " | ".join(labels) + " |",
        "|---" * (len(labels) + 1) + "|",
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in _cells(quality, prefill)]
    lines += ["", "In brackets: relative to the first column timed.", ""] if prefill else [""]
    lines += [f"- {entry.label}: {entry.described}" for entry in entries]
    lines += ["", "Items per task:", ""]
    data = {row.task: f"{row.items} items" + (f" ({row.data})" if row.data else "") for row in quality}
    lines += [f"- {task}: {text}" for task, text in data.items()]
    return "\n".join(lines) + "\n"


def plot(path: Path, quality: Sequence[Quality], prefill: Sequence[Prefill], model: str) -> None:
    """Quality per task (metrics of which more is better) and cost relative to the first column, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), width_ratios=(2, 1), layout="constrained")
    chosen = [row for row in quality if row.higher_is_better]
    _bars(left, [f"{row.task}\n{row.metric}" for row in chosen], [row.values for row in chosen])
    left.set_title(f"{model}: quality")
    left.set_ylim(0, 1)
    costs: list[tuple[str, Mapping[str, float]]] = [
        (f"prefill\n{cost.tokens}", cost.seconds) for cost in prefill
    ]
    costs += [(f"KV\n{cost.tokens}", cost.kv_bytes) for cost in prefill if cost.kv_bytes is not None]
    ratios = [
        {label: value / next(iter(each.values())) for label, value in each.items()} for _, each in costs
    ]
    _bars(right, [name for name, _ in costs], ratios)
    right.set_title("cost, of the first column")
    left.legend()
    figure.savefig(path, format="png", dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, names: Sequence[str], rows: Sequence[Mapping[str, float]]) -> None:
    labels = list(dict.fromkeys(label for row in rows for label in row))
    for number, label in enumerate(labels):
        places = [place + number / (len(labels) + 1) for place in range(len(rows))]
        axes.bar(places, [row.get(label, 0.0) for row in rows], 1 / (len(labels) + 1), label=label)
    axes.set_xticks([place + (len(labels) - 1) / 2 / (len(labels) + 1) for place in range(len(rows))], names)
    axes.tick_params(axis="x", labelsize=7, labelrotation=45 if len(rows) > 6 else 0)
