"""`python -m llm_variator.analyze neurons`: Figure 5 and Table 5 of the paper, for a model and several ratios.

I and U come from the original model, C from the model with its plugin: what a layer reads there has already gone
through the compressed layers before it. The paper's text reads so ("activated neurons of original FFNs").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from llm_variator.analyze.activations import (
    TOLERANCE,
    Definition,
    define,
    read,
    spans,
    watching,
    weight_norms,
)
from llm_variator.analyze.sets import SetCounts, count_sets
from llm_variator.analyze.trained import Training, trained_plugin
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveFloat, PositiveInt
from llm_variator.config import VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.measures import tables
from llm_variator.measures.loading import load_variator
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_tokenizer

DENSE = "1"


@dataclass(frozen=True, kw_only=True)
class Settings(Training):
    """Activated neurons by layer and ratio, and the sets C, I, U (the paper's Figure 5 and Table 5).

    Share of activated neurons by layer and compression ratio, and how the neurons that a merged vector activates relate
    to those of the vectors it stands for.
    """

    ratios: tuple[PositiveInt, ...] = flag((2, 4, 8, 16, 32), "of the plugins")
    plugin: tuple[str, ...] = flag(
        (),
        "trained plugins: shipped name, folder or hub id; other ratios are trained by --train-steps",
        metavar="K=PLUGIN",
    )
    tolerance: PositiveFloat = flag(
        TOLERANCE, "of models without ReLU, see docs/analysis.md: share of the FFN's output"
    )
    tokens: PositiveInt = flag(256, "of each stretch of text")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plugins()

    def plugins(self) -> dict[int, str]:
        """`("2=runs/k2",)` -> {2: "runs/k2"}."""
        found = {}
        for text in self.plugin:
            k, equals, plugin = text.partition("=")
            if not equals or not k.isdecimal() or int(k) < 2:
                raise VariatorError(f"--plugin {text}: write K=PLUGIN, as in 2=runs/k2")
            found[int(k)] = plugin
        return found


def run(settings: Settings) -> dict[str, Any]:
    """Measure, print; returns the figures."""
    ratios = sorted(set(settings.ratios) - {1})
    given = settings.plugins()
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    windows = settings.stretches(tokenizer, settings.tokens)
    folders: dict[int, str | Path] = dict(given)
    if settings.train_steps:
        folders |= {k: trained_plugin(settings, k) for k in ratios if k not in given}
    model = load_variator(settings)
    plugins = {}
    for k in sorted({*ratios, *given}):
        if k in folders:
            model.load_plugin(folders[k], f"k{k}", dtype=torch.float32)
        else:
            model.add_plugin(f"k{k}", VariatorConfig(k=k, sites=("ffn",)))
        if "ffn" not in model.plugins[f"k{k}"].sites:
            raise VariatorError(
                f"--plugin {k}={folders[k]} leaves FFNs as they are: give plugins with the site ffn"
            )
        if other := sorted(set(model.plugin(f"k{k}").plan.ratios["ffn"].values()) - {k}):
            raise VariatorError(
                f"--plugin {k}={folders[k]} merges FFNs by {', '.join(map(str, other))}: give one that merges by {k} "
                "wherever it does"
            )
        with model.use_plugin(f"k{k}"):
            if all(
                spans(model, layer, settings.tokens) is None for layer in range(model.signature.num_layers)
            ):
                raise VariatorError(
                    f"--tokens {settings.tokens} hold no group of {k}: give more, or a smaller ratio"
                )
        plugins[k] = f"k{k}"
    definition = define(model, windows[: settings.batch_size], settings.tolerance)
    figures: dict[str, Any] = {
        "model": settings.model,
        "data": settings.data,
        "windows": len(windows),
        "tokens": settings.tokens,
        "definition": dataclasses.asdict(definition),
        **measure(model, windows, definition, plugins, batch_size=settings.batch_size),
        "plugins": {
            str(k): {
                "config": model.plugins[name].to_dict(),
                "training": _training(settings, k, given, trained=k in folders),
            }
            for k, name in plugins.items()
        },
    }
    _print(figures)
    return figures


def measure(
    model: VariatorModel,
    windows: Tensor,
    definition: Definition,
    plugins: Mapping[int, str],
    *,
    batch_size: int,
) -> dict[str, Any]:
    """Shares of activated neurons and the set relations.

    Args:
        model: holds the plugins.
        windows: (rows, tokens).
        definition: when a neuron is activated.
        plugins: ratio -> name in the model.
        batch_size: rows in one forward pass; one batch's activations of all layers are held as booleans.

    Returns:
        `activated`: ratio (as text; "1" is the original model, over all tokens) -> share of activated neurons per
        layer, None where the layer merges nothing; `activated_mean` over layers; `sets`: ratio -> `SetCounts.shares`
        over all layers; `sets_per_layer`: ratio -> name of the share -> per layer.
    """
    layers, norms = model.signature.num_layers, weight_norms(model)
    dense = [0.0] * layers
    counts = {k: [SetCounts() for _ in range(layers)] for k in plugins}
    batches = windows.split(batch_size)
    with Progress(transient=True) as progress:
        task = progress.add_task("neurons", total=len(batches) * (1 + len(plugins)))
        for batch in batches:
            masks: dict[int, Tensor] = {}
            with (
                model.disable_plugin(),
                watching(model, _keep(masks, definition, norms)),
            ):
                read(model, batch)
            for layer in range(layers):
                dense[layer] += masks[layer].double().mean().item() * len(batch) / len(windows)
            progress.advance(task)
            for k, name in plugins.items():
                with (
                    model.use_plugin(name),
                    watching(model, _compare(model, batch, masks, definition, norms, counts[k])),
                ):
                    read(model, batch)
                progress.advance(task)
    per_layer = {k: [each.shares() for each in found] for k, found in counts.items()}
    activated = {DENSE: dense} | {str(k): [each["c"] for each in found] for k, found in per_layer.items()}
    total = {k: sum(found, SetCounts()).shares() for k, found in counts.items()}
    return {
        "activated_mean": {
            k: fmean(value for value in values if value is not None) for k, values in activated.items()
        },
        "activated": activated,
        "sets": {str(k): shares for k, shares in total.items()},
        "sets_per_layer": {
            str(k): {name: [each[name] for each in found] for name in total[k]}
            for k, found in per_layer.items()
        },
    }


See = Callable[[int, Tensor], None]


def _keep(masks: dict[int, Tensor], definition: Definition, norms: Sequence[Tensor]) -> See:
    def see(layer: int, values: Tensor) -> None:
        masks[layer] = definition.active(layer, values, norms[layer])

    return see


def _compare(
    model: VariatorModel,
    batch: Tensor,
    masks: Mapping[int, Tensor],
    definition: Definition,
    norms: Sequence[Tensor],
    counts: list[SetCounts],
) -> See:
    def see(layer: int, values: Tensor) -> None:
        if (place := spans(model, layer, batch.shape[1])) is None:
            return
        head, groups, k = place
        merged = definition.active(layer, values[:, head : head + groups], norms[layer])
        original = masks[layer][:, head : head + groups * k].unflatten(1, (groups, k))
        counts[layer] += count_sets(original.flatten(0, 1), merged.flatten(0, 1))

    return see


def _training(settings: Training, k: int, given: Mapping[int, str], *, trained: bool) -> str:
    if k in given:
        return given[k]
    if not trained:
        return "untrained: means"
    rows = f"{settings.train_batch} x {settings.train_tokens} tokens of {settings.train_data}"
    return f"{settings.train_steps} steps of {rows}"


def _print(figures: Mapping[str, Any]) -> None:
    rows = []
    for k, share in figures["activated_mean"].items():
        sets = figures["sets"].get(k)
        names = ("c_and_i_of_i", "chance_i", "c_and_u_of_c", "chance_u")
        cells = ["" if sets is None or sets[name] is None else f"{sets[name]:.3f}" for name in names]
        rows.append((k, f"{share:.4f}", *cells))
    title = f"{figures['model']}: activated neurons, {figures['definition']['name']}"
    columns = ("k", "activated", "|C∩I|/|I|", "by chance", "|C∩U|/|C|", "by chance")
    tables.show(title, columns, rows, left=0)
