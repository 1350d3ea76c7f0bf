"""`python -m llm_variator.evaluate continuation`: what follows a prompt, for every plugin and every kind of text."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.cache.naming import cache_of
from llm_variator.errors import VariatorError
from llm_variator.evaluate import questions
from llm_variator.measures import tables
from llm_variator.measures.loading import load_variator
from llm_variator.measures.metrics import continuation_nats, reference_nats
from llm_variator.measures.quality import difference
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import EMBEDDED
from llm_variator.sources.models import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Score:
    """One condition on one text."""

    prompt: str
    """How the prompt was treated: dense, no context, or the plugin's name."""
    cross_entropy: float
    """Nats per token of the continuation."""
    above_dense: float
    above_dense_error: float | None
    """Standard error of the mean difference, over the windows."""
    kv_share: float
    """Bytes of the prompt's KV cache, as a part of the dense cache's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(flags.Stored, flags.LocalData, flags.BaseModel):
    """Cross-entropy of a text's continuation: prompt dense, absent, and compressed by each plugin.

    In nats per token, by teacher forcing; of an absent prompt the last token is left. Every text is shown apart.
    """

    model: str = flag(REQUIRED, "base model: alias, local folder or hub id")
    plugin: tuple[str, ...] = flag((), "shipped name, folder or hub id; none: no plugin", metavar="PLUGIN")
    untrained: bool = flag(False, "also score each plugin's configuration before any training")
    data: tuple[str, ...] = flag(
        (EMBEDDED,),
        f"texts, named as in llm_variator.train, or {questions.ARTICLES}: SQuAD's development articles",
        metavar="SOURCE",
    )
    windows: PositiveInt = flag(16, "stretches of each text, evenly spread over it")
    batch_size: PositiveInt = flag(4, "windows in one forward pass")
    context: PositiveInt = flag(512, "prompt tokens")
    continuation: PositiveInt = flag(128, "tokens scored after the prompt")


def run(settings: Settings, argv: Sequence[str]) -> None:
    """Score dense prompts, absent ones and every plugin, print, store."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    length = settings.context + settings.continuation
    texts = {
        source: questions.read_text(
            source, tokenizer, seq_length=length, count=settings.windows, data_dir=settings.data_dir
        )
        for source in settings.data
    }
    model = load_variator(settings)
    model.decoder_only("continuation", "it scores the text after a prompt")
    plugins = _attach(model, [name for name in settings.plugin if name != "none"], settings)
    scores = {
        source: score_continuation(model, windows, settings.context, plugins, batch_size=settings.batch_size)
        for source, windows in texts.items()
    }
    for source, rows in scores.items():
        _print(rows, settings, source)
    if settings.json:
        figures = {
            "model": settings.model,
            "context": settings.context,
            "continuation": settings.continuation,
            "windows": settings.windows,
            "texts": {
                source: [dataclasses.asdict(score) for score in rows] for source, rows in scores.items()
            },
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
    references = reference_nats(model, windows, context, batch_size=batch_size)

    def score(label: str, nats: list[float], kv_share: float) -> Score:
        return Score(label, statistics.fmean(nats), *difference(nats, references["dense"]), kv_share)

    scores = [score("dense", references["dense"], 1.0)]
    scores.append(score("no context", references["no_context"], 1 / context))
    for name, label in plugins.items():
        with model.use_plugin(name):
            nats = continuation_nats(model, windows, context, batch_size=batch_size)
            scores.append(score(label, nats, _kv_share(model, windows[:1, :context])))
    return scores


@torch.inference_mode()
def _kv_share(model: VariatorModel, prompt: Tensor) -> float:
    prompt = prompt.to(device=model.device, dtype=torch.long)
    report = model.kv_cache_report(cache_of(model(prompt, use_cache=True, logits_to_keep=1)))
    return report.bytes / report.dense_bytes


def _attach(model: VariatorModel, names: Sequence[str], settings: Settings) -> dict[str, str]:
    """Load the plugins and, where asked for, untrained ones of the same configuration."""
    labels: dict[str, str] = {}
    for number, name in enumerate(names):
        if name in labels.values():
            raise VariatorError(f"--plugin {name} is given twice: leave one out")
        model.load_plugin(name, f"plugin{number}")
        labels[f"plugin{number}"] = name
        if settings.untrained:
            torch.manual_seed(settings.seed)
            model.add_plugin(f"untrained{number}", model.plugins[f"plugin{number}"])
            labels[f"untrained{number}"] = f"{name} (untrained)"
    return labels


def _print(scores: Sequence[Score], settings: Settings, source: str) -> None:
    rows = [
        (
            score.prompt,
            f"{score.cross_entropy:.4f}",
            f"{score.above_dense:+.4f}",
            "" if score.above_dense_error is None else f"{score.above_dense_error:.4f}",
            f"{score.kv_share:.1%}",
        )
        for score in scores
    ]
    tables.show(
        f"{settings.model} on {source}: the {settings.continuation} tokens after {settings.context}, "
        f"{settings.windows} windows",
        ("prompt", "nats/token", "above dense", "±", "KV bytes"),
        rows,
    )
