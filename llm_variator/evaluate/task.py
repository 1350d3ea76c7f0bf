"""Score of a model on a task, as it is or with a plugin or baseline: no training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import track

from llm_variator.baselines import TokenPruning
from llm_variator.baselines.ltp import LTP_FILE
from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import Device, PositiveInt
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model, load_tokenizer
from llm_variator.sources.tasks import TASKS, find_task, load_examples, score
from llm_variator.sources.tasks.forms import form_for, predict_all


@dataclass(frozen=True, kw_only=True)
class Settings(flags.Stored, flags.LocalData):
    """Score on one of the paper's seven tasks: a model as it is, or with a plugin.

    In percent, on the task's validation split.
    """

    model: str = flag(REQUIRED, "fine-tuned model, student or model with token pruning: its folder")
    plugin: str | None = flag(None, "with this plugin (default: the model as it is)", metavar="DIR")
    task: str = flag(REQUIRED, "scored on its validation split", choices=tuple(TASKS))
    limit: PositiveInt | None = flag(None, "so many examples, drawn at random (default: all)")
    batch_size: PositiveInt = flag(16, "examples in one pass")
    max_length: PositiveInt = flag(512, "most prompt tokens; longer inputs are cut")
    dtype: str | None = flag(None, "of the weights (default: as stored)")
    device: Device = flag("cpu", "where to compute")
    quantize: Literal["nf4", "int8"] | None = flag(
        None, "the base's matrices in 4 bits (NF4) or 8 (int8), by bitsandbytes; plugins stay as they are"
    )


def run(settings: Settings, argv: Sequence[str]) -> dict[str, Any]:
    """Predict, score, print; returns the figures."""
    started = time.perf_counter()
    task = find_task(settings.task)
    examples = load_examples(task, "validation", data_dir=settings.data_dir, limit=settings.limit)
    base = load_model(
        settings.model, dtype=settings.dtype, device=settings.device, quantize=settings.quantize
    )
    form = form_for(base, task, load_tokenizer(settings.model), max_length=settings.max_length)
    model: Any = VariatorModel.from_pretrained(base, settings.plugin) if settings.plugin else base
    if (Path(settings.model) / LTP_FILE).is_file():
        TokenPruning.load(base, settings.model)
    batches = -(-len(examples) // settings.batch_size)
    predictions = predict_all(
        form,
        model,
        examples,
        batch_size=settings.batch_size,
        progress=lambda rounds: iter(track(rounds, task.name, total=batches)),
    )
    origin, scores = examples[0].origin, score(task, predictions, examples)
    print(", ".join(f"{name} {value:.2f}" for name, value in scores.items()))
    figures = {
        "held_out": scores,
        "data": {"measured on": f"{origin.name}: {origin.describe(len(examples))}"},
    }
    if settings.json:
        write_result(
            settings.json, figures, command=["llm_variator.evaluate", *argv], seed=None, started=started
        )
    return figures
