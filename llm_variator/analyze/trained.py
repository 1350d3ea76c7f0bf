"""Plugins that an analysis trains for itself, by `llm_variator.train`, each once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from llm_variator.analyze.settings import Reading
from llm_variator.cli import flag
from llm_variator.cli.values import Natural, PositiveInt
from llm_variator.sources.corpora import EMBEDDED
from llm_variator.train.__main__ import RESULT_FILE
from llm_variator.train.__main__ import main as train


@dataclass(frozen=True, kw_only=True)
class Training(Reading):
    """Training."""

    train_steps: Natural = flag(0, "train FFN plugins for so long; 0: merge by means")
    train_data: str = flag(EMBEDDED, "text, named as in llm_variator.train", metavar="SOURCE")
    train_batch: PositiveInt = flag(4, "rows in a step")
    train_tokens: PositiveInt = flag(128, "in a row")
    work: Path = flag(Path("runs/analyze"), "trained plugins are kept here, and found again")


def trained_plugin(settings: Training, k: int) -> Path:
    """The folder of an FFN plugin of ratio `k`, trained now unless it was before; loss: the paper's MSE."""
    given = {
        "model": settings.model,
        "k": k,
        "sites": "ffn",
        "dtype": settings.dtype,
        "max-steps": settings.train_steps,
        "batch-size": settings.train_batch,
        "seq-length": settings.train_tokens,
        "data": settings.train_data,
        "seed": settings.seed,
        "continuation": settings.train_tokens // 4,
        "eval-windows": 8,
        "save-every": 0,
        "eval-every": settings.train_steps,
        "device": "cuda" if settings.device != "cpu" else "cpu",
    }
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    flags += ["--random-init"] if settings.random_init else []
    flags += ["--num-layers", str(settings.num_layers)] if settings.num_layers else []
    name = hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:8]
    folder = settings.work / f"k{k}-{name}"
    if not (folder / RESULT_FILE).is_file():
        place = ["--data-dir", str(settings.data_dir)] if settings.data_dir else []
        train([*flags, *place, "--output", str(folder)])
    return folder
