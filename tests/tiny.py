"""A tiny decoder with a byte tokenizer in a local folder, and short runs of training on it."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from conftest import make_decoder

from llm_variator.sources.models import byte_tokenizer

SHORT = {
    "--seq-length": 24,
    "--continuation": 8,
    "--prompt-tokens": (8, 16),
    "--eval-windows": 2,
    "--max-steps": 6,
    "--save-every": 2,
    "--logging-every": 1,
    "--warmup-steps": 2,
    "--k": 2,
    "--r": 4,
    "--dense-head": 1,
    "--device": "cpu",
}
FIT = {
    "--sites": "kv",
    "--compressor": "kv=select",
    "--keep": 0.5,
    "--block": 8,
    "--dense-tail": 6,
    "--fit-samples": 8,
    "--fit-tokens": (60, 90),
    "--calibrate-tokens": 96,
    "--save-every": 3,
    "--device": "cpu",
}


@functools.cache
def model_folder() -> str:
    """A folder that `load_model` and `load_tokenizer` read; it lives as long as the process."""
    folder = tempfile.TemporaryDirectory()
    model_folder.keep = folder  # type: ignore[attr-defined]
    model = make_decoder("llama", vocab_size=259)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)  # so that attention and FFN outweigh the embedding
    model.save_pretrained(folder.name)
    byte_tokenizer().save_pretrained(folder.name)
    return folder.name


def words(output: Path | None, *flags: str, **changes) -> list[str]:
    """The command line of a short run; `changes` are flags with underscores, None leaves one out."""
    return _line(SHORT, output, flags, changes)


def fit_words(output: Path | None, *flags: str, **changes) -> list[str]:
    """Likewise of a short fit of scores."""
    return _line(FIT, output, flags, changes)


def _line(settings: dict, output: Path | None, flags: tuple[str, ...], changes: dict) -> list[str]:
    settings = {"--model": model_folder(), "--output": output} | settings
    settings |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    line = []
    for name, value in settings.items():
        if value is not None:
            line += [name, *map(str, value if isinstance(value, (tuple, list)) else (value,))]
    return [*line, *flags]


def train(output: Path, *flags: str, **changes) -> dict:
    """Run the command in this process; the figures of its training.json."""
    from llm_variator.train.__main__ import main  # not in the environment of the vLLM tests

    main(words(output, *flags, **changes))
    return json.loads((output / "training.json").read_text(encoding="utf-8"))["figures"]
