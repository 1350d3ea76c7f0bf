"""Plugins that an analysis trains for itself, by `llm_variator.train`, each once."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from llm_variator import old_cli as cli
from llm_variator.sources.corpora import EMBEDDED
from llm_variator.train.__main__ import RESULT_FILE
from llm_variator.train.__main__ import main as train


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """What `trained_plugin` reads, beside the flags of model, data folder, device and seed."""
    add = parser.add_argument_group("training").add_argument
    add("--train-steps", type=cli.natural, default=0, help="train FFN plugins for so long; 0: merge by means")
    add("--train-data", default=EMBEDDED, metavar="SOURCE", help="text, named as in llm_variator.train")
    add("--train-batch", type=cli.positive_int, default=4, help="rows in a step")
    add("--train-tokens", type=cli.positive_int, default=128, help="in a row")
    add(
        "--work",
        type=Path,
        default=Path("runs/analyze"),
        help="trained plugins are kept here, and found again",
    )


def trained_plugin(args: argparse.Namespace, k: int) -> Path:
    """The folder of an FFN plugin of ratio `k`, trained now unless it was before; loss: the paper's MSE."""
    flags = ["--model", str(args.model), "--k", str(k), "--sites", "ffn", "--dtype", args.dtype]
    flags += ["--max-steps", str(args.train_steps), "--batch-size", str(args.train_batch)]
    flags += ["--seq-length", str(args.train_tokens), "--data", args.train_data, "--seed", str(args.seed)]
    flags += ["--continuation", str(args.train_tokens // 4), "--eval-windows", "8", "--save-every", "0"]
    flags += ["--eval-every", str(args.train_steps), "--device", "cuda" if args.device != "cpu" else "cpu"]
    flags += ["--random-init"] if args.random_init else []
    flags += ["--num-layers", str(args.num_layers)] if args.num_layers else []
    name = hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:8]
    folder = Path(args.work) / f"k{k}-{name}"
    if not (folder / RESULT_FILE).is_file():
        place = ["--data-dir", str(args.data_dir)] if args.data_dir else []
        train([*flags, *place, "--output", str(folder)])
    return folder
