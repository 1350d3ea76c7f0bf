"""Score of a model on a task, as it is or with a plugin or baseline: no training."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from llm_variator import old_cli as cli
from llm_variator.baselines import TokenPruning
from llm_variator.baselines.ltp import LTP_FILE
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model, load_tokenizer
from llm_variator.sources.tasks import TASKS, find_task, load_examples, score
from llm_variator.sources.tasks.forms import form_for, predict_all


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate task`."""
    add = parser.add_argument
    add("--model", required=True, help="fine-tuned model, student or model with token pruning: its folder")
    add("--plugin", metavar="DIR", help="with this plugin (default: the model as it is)")
    add("--task", required=True, choices=list(TASKS), help="scored on its validation split")
    add(
        "--data-dir", type=Path, help="folder of local data sets NAME/SPLIT.parquet (default: $VARIATOR_DATA)"
    )
    add("--limit", type=cli.positive_int, help="so many examples, drawn at random (default: all)")
    add("--batch-size", type=cli.positive_int, default=16, help="examples in one pass")
    add("--max-length", type=cli.positive_int, default=512, help="most prompt tokens; longer inputs are cut")
    add("--dtype", help="of the weights (default: as stored)")
    add("--device", default="cpu", help="where to compute")
    cli.add_quantize_flag(add)
    add("--json", type=Path, metavar="FILE", help="store the figures with command, versions and machine")


def run(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Predict, score, print; returns the figures."""
    started = time.perf_counter()
    task = find_task(args.task)
    examples = load_examples(task, "validation", data_dir=args.data_dir, limit=args.limit)
    base = load_model(args.model, dtype=args.dtype, device=args.device, quantize=args.quantize)
    form = form_for(base, task, load_tokenizer(args.model), max_length=args.max_length)
    model: Any = VariatorModel.from_pretrained(base, args.plugin) if args.plugin else base
    if (Path(args.model) / LTP_FILE).is_file():
        TokenPruning.load(base, args.model)
    batches = -(-len(examples) // args.batch_size)
    predictions = predict_all(
        form,
        model,
        examples,
        batch_size=args.batch_size,
        progress=lambda rounds: iter(track(rounds, task.name, total=batches)),
    )
    origin = examples[0].origin
    figures = {
        "held_out": score(task, predictions, examples),
        "data": {"measured on": f"{origin.name}: {origin.describe(len(examples))}"},
    }
    if args.json:
        write_result(args.json, figures, command=["llm_variator.evaluate", *argv], seed=None, started=started)
    print(", ".join(f"{name} {value:.2f}" for name, value in score(task, predictions, examples).items()))
    return figures
