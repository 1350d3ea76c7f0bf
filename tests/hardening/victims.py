"""What is killed: processes that save, train and resume for ever. Imported by `test_kill` and by its processes."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
from conftest import make_variator, prompts

from llm_variator import VariatorConfig, VariatorModel
from llm_variator.train.__main__ import main
from llm_variator.train.fitting import MOMENTS_FILE

CONFIGS = {
    "merges": VariatorConfig(k=2, sites=("ffn", "kv"), r=256),
    "keeps": VariatorConfig(
        sites=("kv",), compressor="select", k_per_head=((1, 2), (2, 4)), block=16, dense_tail=2
    ),
}
STEPS = 10


def model(form: str) -> VariatorModel:
    """A tiny model whose plugin and contexts are of some megabytes, so that writing them takes time."""
    torch.set_num_threads(1)
    return make_variator(
        "llama", CONFIGS[form], num_hidden_layers=2, hidden_size=512, num_attention_heads=8, head_dim=64
    )


def fill(model: VariatorModel, number: int) -> None:
    """Every weight of the plugin is `number`: a mixture of two saves is seen."""
    with torch.no_grad():
        for parameter in model.plugin().parameters():
            parameter.fill_(number)


def saves(folder: Path, started, counter) -> None:
    """Save a plugin again and again, each time with the next number in all weights; `counter`: the last done."""
    own, first = model("merges"), counter.value + 1
    for number in itertools.count(first):
        fill(own, number)
        if number > first:
            started.set()
        own.save_pretrained(folder)
        counter.value = number


def saves_contexts(file: Path, form: str, started, counter) -> None:
    """Likewise the context of a prompt as long as the number."""
    own, first = model(form), counter.value + 1
    (ids,) = prompts(400)
    for number in itertools.count(first):
        context = own.compress(ids[:, : 100 + number % 300])
        if number > first:
            started.set()
        context.save(file)
        counter.value = number


def trains(folder: Path, model_folder: str, started, counter) -> None:
    """A whole training run, or the rest of one."""
    tiny.model_folder = lambda: model_folder
    line = tiny.words(folder, max_steps=STEPS, save_every=2, eval_every=2)
    resume = any(folder.glob("checkpoint-*"))
    # killed before the first checkpoint was whole: what is left is refused, by name, and a new run begins
    _goes_on(line, resume, started, refused="start without --resume")
    counter.value = STEPS


def fits(folder: Path, model_folder: str, started, counter) -> None:
    """A whole fit of scores, or the rest of one."""
    tiny.model_folder = lambda: model_folder
    _goes_on(tiny.fit_words(folder, save_every=1), (folder / MOMENTS_FILE).exists(), started)
    counter.value = tiny.FIT["--fit-samples"]


def _goes_on(line: list[str], resume: bool, started, refused: str | None = None) -> None:
    torch.set_num_threads(1)
    started.set()
    try:
        main([*line, "--resume"] if resume else line)
    except ValueError as error:
        if refused is None or refused not in str(error):
            raise
        main(line)
