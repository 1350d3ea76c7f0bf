"""Plugins side by side: quality by lm-eval, measured prefill time and KV bytes."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from llm_variator.engine.cache.naming import cache_of
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.evaluate.render import HF, Entry, Prefill, Quality, markdown, plot, show
from llm_variator.measures.compare import DENSE
from llm_variator.measures.results import scrub_paths, write_result
from llm_variator.measures.timing import Case, fair_head, interleaved
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import EMBEDDED, read_windows
from llm_variator.sources.models import model_source, shipped_plugins

if TYPE_CHECKING:
    from lm_eval.config.evaluate_config import EvaluatorConfig

_SHARE = re.compile(r"0?\.\d+")


def parse_entries(text: str, model: str) -> list[Entry]:
    """`none,k2,mine=runs/k4,means4=4` -> entries.

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
    if label in (DENSE, HF):
        raise VariatorError(f"--compare {part!r}: {label} is a column of its own; give another label")
    if given and value.isdecimal():
        if int(value) < 1:
            raise VariatorError(f"--compare {part!r}: the ratio must be at least 1")
        return Entry(label, k=int(value))
    if given and _SHARE.fullmatch(value):
        return Entry(label, keep=float(value))
    name = value if given else label
    shipped = shipped_plugins()
    if f"{model}/{name}" in shipped:
        return Entry(label, plugin=f"{model}/{name}")
    if name in shipped or Path(name).expanduser().is_dir() or "/" in name:
        return Entry(label if given else Path(name).name, plugin=name)
    raise VariatorError(
        f"--compare: no plugin {name!r} is shipped for {model} (shipped are: {', '.join(shipped)}); write "
        f"{label}=FOLDER for one of yours, {label}=K for an untrained one of ratio K, or {label}=0.25 for an "
        "untrained one that keeps a quarter"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is set side by side, and where it goes."""

    model: str
    """The base model."""
    entries: Sequence[Entry]
    prompt_tokens: tuple[int, ...]
    """Prompts whose reading is timed."""
    repetitions: int
    """Of the timing; 0: nothing is timed."""
    output: Path | None
    """Ends in .json; a table and a plot are put beside it."""
    config: EvaluatorConfig
    """lm-eval's settings for the base model in our model type."""


def run(comparison: Comparison, argv: Sequence[str], *, started: float) -> None:
    """Evaluate every entry, measure, print and store.

    Args:
        comparison: what to do.
        argv: the whole command line, for the stored result.
        started: `time.perf_counter()` at the start.
    """
    model, entries, config = comparison.model, comparison.entries, comparison.config
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about flags that are meant here
    console = Console()
    lm, runs = _evaluate_all(comparison, console)
    names = {
        entry.label: None if entry.label == DENSE else entry.label for entry in entries if entry.label != HF
    }
    prefill = []
    if names and comparison.repetitions:
        windows = read_windows(EMBEDDED, lm.tokenizer, seq_length=max(comparison.prompt_tokens))
        prefill = [
            measure_prefill(lm.variator, names, windows[:1, :tokens].to(lm.device), comparison.repetitions)
            for tokens in comparison.prompt_tokens
        ]
    quality = quality_rows(runs)
    show(quality, prefill, model)
    if not (output := comparison.output):
        return
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
    seed = config.seed[0] if config.seed else None
    write_result(output, figures, command=["llm_variator.evaluate", *argv], seed=seed, started=started)
    text = markdown(quality, prefill, model, entries)
    write_atomically(output.with_suffix(".md"), scrub_paths(text))
    plot(output.with_suffix(".png"), quality, prefill, scrub_paths(model))
    console.print(f"stored in {output}, with .md and .png", highlight=False)


def _evaluate_all(comparison: Comparison, console: Console) -> tuple[Any, dict[str, dict[str, Any]]]:
    """Our model type with all plugins loaded, and lm-eval's results by label."""
    from llm_variator.integrations import harness

    model, entries, config = comparison.model, comparison.entries, comparison.config
    tasks = config.process_tasks(config.metadata)
    options = {name: value for name, value in config.model_args.items() if name != "pretrained"}
    options |= dict(batch_size=config.batch_size, max_batch_size=config.max_batch_size, device=config.device)
    kind = harness.VariatorSeq2SeqLM if config.model == "variator-seq2seq" else harness.VariatorLM
    lm = kind(model, **options)
    for entry in entries:
        if entry.plugin:
            lm.variator.load_plugin(entry.plugin, entry.label)
        elif entry.k is not None:
            lm.variator.add_plugin(entry.label, harness.mean_config(entry.k))
        elif entry.keep is not None:
            lm.variator.add_plugin(entry.label, harness.kept_config(entry.keep))
    runs: dict[str, dict[str, Any]] = {}
    for entry in entries:
        console.print(f"== {entry.label}: {entry.described}", highlight=False)
        begun = time.perf_counter()
        if entry.label == HF:
            theirs = {name: value for name, value in options.items() if name not in harness.OURS}
            runs[HF] = _evaluate(harness.HFLM(model_source(model), **theirs), config, tasks)
            gc.collect()
        else:
            lm.variator.set_plugin(None if entry.label == DENSE else entry.label)
            runs[entry.label] = _evaluate(lm, config, tasks)
        runs[entry.label]["seconds"] = time.perf_counter() - begun
    lm.variator.set_plugin(None)
    return lm, runs


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
            gaps = [
                abs(ours[0] - theirs[0])
                for ours, theirs in pairs
                if isinstance(ours, tuple) and isinstance(ours[0], float)
            ]
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
    # of a whole text there is its log-likelihood alone
    return [
        answer if isinstance(answer, str) else (answer,) if isinstance(answer, float) else tuple(answer)
        for answer in answers
    ]


@torch.inference_mode()
def measure_prefill(
    model: VariatorModel, names: Mapping[str, str | None], prompt: Tensor, repetitions: int
) -> Prefill:
    """Time and KV bytes of reading a prompt (1, tokens) with each plugin, in turns.

    Of T5 the encoder is measured, with one token of the decoder.
    """
    seq2seq = model.config.is_encoder_decoder
    given: dict[str, Any] = (
        dict(decoder_input_ids=torch.zeros_like(prompt[:, :1]), use_cache=False)
        if seq2seq
        else dict(logits_to_keep=1, use_cache=True)
    )
    prompt = prompt.long()
    held: dict[str, int] = {}

    def reading(label: str, name: str | None) -> Case:
        def note(output: Any) -> None:
            if not seq2seq:
                held[label] = model.kv_cache_report(cache_of(output)).bytes

        return Case(lambda _: model(prompt, **given), inside=lambda: model.use_plugin(name), after=note)

    cases = {label: reading(label, name) for label, name in names.items()}
    with fair_head(model.base):
        times = interleaved(cases, repetitions, device=prompt.device)
    seconds = {label: statistics.median(own) for label, own in times.items()}
    return Prefill(prompt.shape[1], seconds, None if seq2seq else held)
