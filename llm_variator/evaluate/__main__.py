"""`python -m llm_variator.evaluate`: text continued after a compressed prompt, the paper's tasks, lm-eval's tasks."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_variator import cli
from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.cache.naming import cache_of
from llm_variator.evaluate import frontier, harness, sensitivity, task
from llm_variator.measures import tables
from llm_variator.measures.loading import load_variator
from llm_variator.measures.metrics import continuation_cross_entropy, reference_conditions
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import EMBEDDED, enough, read_windows, spread
from llm_variator.sources.models import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Score:
    """One row of the table."""

    prompt: str
    """How the prompt was treated: dense, no context, or the plugin's name."""
    cross_entropy: float
    """Nats per token of the continuation."""
    kv_share: float
    """Bytes of the prompt's KV cache, as a part of the dense cache's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation(flags.Stored, flags.Text, flags.BaseModel):
    """Cross-entropy of a text's continuation: prompt dense, absent, and compressed by each plugin.

    In nats per token, by teacher forcing; of an absent prompt the last token is left.
    """

    model: str = flag(REQUIRED, "base model: alias, local folder or hub id")
    plugin: tuple[str, ...] = flag((), "shipped name, folder or hub id; none: no plugin", metavar="PLUGIN")
    untrained: bool = flag(False, "also score each plugin's configuration before any training")
    data: str = EMBEDDED
    context: PositiveInt = flag(512, "prompt tokens")
    continuation: PositiveInt = flag(128, "tokens scored after the prompt")


Settings = Continuation | task.Settings | frontier.Settings | sensitivity.Settings | harness.Settings


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives; their class tells the command."""
    words = _words(argv)
    if words[:1] == ["harness"]:
        return harness.read(words[1:])
    commands = {
        "continuation": Continuation,
        "task": task.Settings,
        "frontier": frontier.Settings,
        "sensitivity": sensitivity.Settings,
        "harness": harness.Settings,
    }
    settings: Settings = cli.read_command(
        commands, words, prog="python -m llm_variator.evaluate", text="Measure the quality of plugins."
    )
    return settings


def _words(argv: Sequence[str] | None) -> list[str]:
    """The command line, with the word `harness` where it was left out."""
    words = list(sys.argv[1:] if argv is None else argv)
    left_out = bool(words) and words[0].startswith("-") and words[0] not in ("-h", "--help")
    return ["harness", *words] if left_out else words


def main(argv: Sequence[str] | None = None) -> None:
    """Run one evaluation, print its table and store its figures."""
    settings, words = read(argv), _words(argv)
    match settings:
        case Continuation():
            run(settings, words)
        case task.Settings():
            task.run(settings, words)
        case frontier.Settings():
            frontier.run(settings, words)
        case sensitivity.Settings():
            sensitivity.run(settings, words)
        case harness.Settings():
            harness.run(settings, words)


def run(settings: Continuation, argv: Sequence[str]) -> None:
    """Score dense prompts, absent ones and every plugin, print, store."""
    started = time.perf_counter()
    windows = _windows(settings)
    model = load_variator(settings)
    model.decoder_only("continuation", "it scores the text after a prompt")
    plugins = _attach(model, [name for name in settings.plugin if name != "none"], settings)
    scores = score_continuation(model, windows, settings.context, plugins, batch_size=settings.batch_size)
    _print(scores, settings, len(windows))
    if settings.json:
        figures = {
            "model": settings.model,
            "data": settings.data,
            "context": settings.context,
            "continuation": settings.continuation,
            "windows": len(windows),
            "scores": [dataclasses.asdict(score) for score in scores],
            "configs": {label: model.plugins[name].to_dict() for name, label in plugins.items()},
        }
        command = ["llm_variator.evaluate", *argv]
        write_result(settings.json, figures, command=command, seed=settings.seed, started=started)
        print(f"stored in {settings.json}")


def score_continuation(
    model: VariatorModel, windows: Tensor, context: int, plugins: dict[str, str], *, batch_size: int
) -> list[Score]:
    """Score dense prompts, no prompt, and every plugin, over the same tokens.

    Args:
        model: holds the plugins.
        windows: (rows, tokens), prompt and continuation.
        context: prompt tokens of each row.
        plugins: name in the model -> label in the table.
        batch_size: rows in one forward pass.
    """
    references = reference_conditions(model, windows, context, batch_size=batch_size)
    scores = [
        Score("dense", references["dense"], 1.0),
        Score("no context", references["no_context"], 1 / context),
    ]
    for name, label in plugins.items():
        with model.use_plugin(name):
            nats = continuation_cross_entropy(model, windows, context, batch_size=batch_size)
            scores.append(Score(label, nats, _kv_share(model, windows[:1, :context])))
    return scores


@torch.inference_mode()
def _kv_share(model: VariatorModel, prompt: Tensor) -> float:
    prompt = prompt.to(device=model.device, dtype=torch.long)
    report = model.kv_cache_report(cache_of(model(prompt, use_cache=True, logits_to_keep=1)))
    return report.bytes / report.dense_bytes


def _windows(settings: Continuation) -> Tensor:
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    length = settings.context + settings.continuation
    windows = read_windows(settings.data, tokenizer, seq_length=length, data_dir=settings.data_dir)
    return spread(enough(windows, settings.windows, settings.data), settings.windows)


def _attach(model: VariatorModel, names: Sequence[str], settings: Continuation) -> dict[str, str]:
    """Load the plugins and, where asked for, untrained ones of the same configuration."""
    labels: dict[str, str] = {}
    for number, name in enumerate(names):
        model.load_plugin(name, f"plugin{number}")
        labels[f"plugin{number}"] = name
        if settings.untrained:
            torch.manual_seed(settings.seed)
            model.add_plugin(f"untrained{number}", model.plugins[f"plugin{number}"])
            labels[f"untrained{number}"] = f"{name} (untrained)"
    return labels


def _print(scores: Sequence[Score], settings: Continuation, windows: int) -> None:
    dense = scores[0].cross_entropy
    rows = [
        (
            score.prompt,
            f"{score.cross_entropy:.4f}",
            f"{score.cross_entropy - dense:+.4f}",
            f"{score.kv_share:.1%}",
        )
        for score in scores
    ]
    tables.show(
        f"{settings.model} on {settings.data}: the {settings.continuation} tokens after {settings.context}, "
        f"{windows} windows",
        ("prompt", "nats/token", "above dense", "KV entries"),
        rows,
    )


if __name__ == "__main__":
    cli.run(main)
