"""`python -m llm_variator.analyze merge`: what a trained plugin has learned, layer by layer, and where it fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from llm_variator.analyze.activations import read
from llm_variator.analyze.observe import Observer, drift, merged_span
from llm_variator.analyze.settings import Reading
from llm_variator.analyze.token_losses import by_category, token_losses
from llm_variator.cli import REQUIRED, flag
from llm_variator.cli.values import Natural, PositiveInt
from llm_variator.config import VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.evaluate.probe import open_probe
from llm_variator.evaluate.sensitivity import WORK, measure_layers
from llm_variator.measures import tables
from llm_variator.measures.loading import load_variator
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_tokenizer

NAME = "plugin"


@dataclass(frozen=True, kw_only=True)
class Settings(Reading):
    """Learned merge weights, reconstruction, sensitivity of layers, tokens that suffer most.

    What a trained plugin has learned: merge weights by position in the group, how well each layer's output is restored,
    which layers are sensitive, and which tokens after the prompt suffer.
    """

    plugin: str = flag(REQUIRED, "shipped name, folder or hub id")
    batch_size: PositiveInt = 2
    context: PositiveInt = flag(512, "prompt tokens")
    continuation: PositiveInt = flag(128, "tokens after the prompt (decoders)")
    sensitivity_windows: Natural = flag(
        2, "of them, for merging every layer alone (decoders); 0: leave that out"
    )
    work: Path = flag(WORK, "sensitivities are kept here, and not measured again")


def run(settings: Settings) -> dict[str, Any]:
    """Measure, print; returns the figures."""
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    model = load_variator(settings)
    model.load_plugin(settings.plugin, NAME)
    model.set_plugin(NAME)
    config = model.plugin().config
    if not model.plugin().sites:
        raise VariatorError(
            f"{settings.plugin} merges nothing, it keeps single keys and values: analyze merge is for plugins that "
            "merge"
        )
    context, batch_size = settings.context, settings.batch_size
    if not merged_span(model, context):
        raise VariatorError(f"--context {context} holds no group that {settings.plugin} merges: give more")
    length = context + (settings.continuation if model.is_decoder else 0)
    windows = settings.stretches(tokenizer, length)
    prompts = windows[:, :context]
    figures: dict[str, Any] = {
        "model": settings.model,
        "plugin": settings.plugin,
        "config": config.to_dict(),
        "data": settings.data,
        "windows": len(windows),
        "context": context,
        "continuation": length - context,
        **observed(model, prompts, batch_size),
        "drift": drift(model, prompts, batch_size),
    }
    if model.is_decoder:
        losses = token_losses(model, windows, context, batch_size)
        figures["tokens"] = by_category(
            losses, windows, context, merged_span(model, context), lambda ids: str(tokenizer.decode(ids))
        )
        if settings.sensitivity_windows:
            figures["sensitivity"] = sensitivity(
                model, windows[: settings.sensitivity_windows], context, batch_size, settings.work
            )
    _print(figures)
    return figures


def observed(model: VariatorModel, prompts: Tensor, batch_size: int) -> dict[str, Any]:
    """Merge weights and reconstruction errors of the active plugin over `prompts` (rows, tokens).

    Returns:
        `weights`: site -> layer -> `mean` and `deviation` by position in the group (the last place is the last
        token), `last_wins`, the share of groups in which the last token has the greatest weight, and `groups`.
        `last_wins`: site -> over all layers. `reconstruction`: layer -> mean relative error of the FFN's restored
        outputs, `restored` and `copied` (had the merged output been copied), and `by_position`.
    """
    observer = Observer(model)
    with torch.inference_mode(), observer.watching():
        for batch in track(prompts.split(batch_size), "merge", transient=True):
            read(model, batch)
    weights: dict[str, dict[str, Any]] = {}
    for (site, layer), found in observer.weights.items():
        weights.setdefault(site, {})[str(layer)] = {
            "mean": found.mean,
            "deviation": found.deviation,
            "last_wins": observer.wins[site, layer].mean[0],
            "groups": found.count,
        }
    return {
        "weights": weights,
        "last_wins": {
            site: fmean(each["last_wins"] for each in layers.values()) for site, layers in weights.items()
        },
        "reconstruction": {
            str(layer): {
                "restored": fmean(found.mean),
                "copied": fmean(observer.copied[layer].mean),
                "by_position": found.mean,
            }
            for layer, found in observer.restored.items()
        },
    }


def sensitivity(
    model: VariatorModel, windows: Tensor, context: int, batch_size: int, work: Path
) -> dict[str, Any]:
    """`evaluate sensitivity` at the plugin's own ratios: each layer merged alone, untrained.

    Returns:
        Site -> `k`, the commonest ratio, and `divergence`, nats from the dense predictions per layer.
    """
    plugin = model.plugin()
    config = plugin.config
    template = VariatorConfig(
        dense_head=config.dense_head, dense_tail=config.dense_tail, compressor="mean", decompressor="copy"
    )
    probe = open_probe(model, windows, context, batch_size, work)
    found = {}
    for site in config.sites:
        if site in ("ffn", "kv") and site in plugin.plan.ratios:
            k = Counter(own.k for (name, _), own in plugin.sites.items() if name == site).most_common(1)[0][0]
            harms = measure_layers(probe, template, site, [k])
            found[site] = {"k": k, "divergence": [each.get(k) for each in harms]}
    return found


def _print(figures: Mapping[str, Any]) -> None:
    rows = []
    sites = list(figures["weights"])
    layers = sorted({int(layer) for site in sites for layer in figures["weights"][site]})
    for layer in map(str, layers):
        own = (figures["weights"][site].get(layer) for site in sites)
        cells = ["-" if found is None else f"{found['mean'][-1]:.3f}" for found in own]
        error = figures["reconstruction"].get(layer)
        cells += ["-", "-"] if error is None else [f"{error['restored']:.3f}", f"{error['copied']:.3f}"]
        rows.append((layer, *cells))
    title = f"{figures['plugin']}: merge weight of the last token, and errors of the FFN's output"
    tables.show(title, ["layer", *(f"{site} last" for site in sites), "restored", "copied"], rows, left=0)
    for kind in figures.get("tokens", {}).get("by_origin", []):
        print(
            f"{kind['kind']}: {kind['tokens']} tokens, {kind['dense']:.3f} -> {kind['compressed']:.3f} nats"
        )
