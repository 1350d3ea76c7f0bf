"""`python -m llm_variator.analyze merge`: what a trained plugin has learned, layer by layer, and where it fails."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from llm_variator import old_cli as cli
from llm_variator.analyze.activations import mean, read
from llm_variator.analyze.observe import Observer, drift
from llm_variator.analyze.token_losses import by_category, token_losses
from llm_variator.config import VariatorConfig
from llm_variator.engine.groups import split
from llm_variator.evaluate.probe import open_probe
from llm_variator.evaluate.sensitivity import WORK, measure_layers
from llm_variator.measures import tables
from llm_variator.measures.loading import load_variator
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import enough, read_windows, spread
from llm_variator.sources.models import load_tokenizer

NAME = "plugin"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `analyze merge`."""
    add = parser.add_argument
    add("--model", required=True, help="base model: alias, local folder or hub id")
    add("--plugin", required=True, help="shipped name, folder or hub id")
    cli.add_text_flags(add, data="wikitext2/test", windows=16, batch_size=2)
    add("--context", type=cli.positive_int, default=512, help="prompt tokens")
    add("--continuation", type=cli.positive_int, default=128, help="tokens after the prompt (decoders)")
    add(
        "--sensitivity-windows",
        type=cli.natural,
        default=2,
        help="of them, for merging every layer alone (decoders); 0: leave that out",
    )
    add("--work", type=Path, default=WORK, help="sensitivities are kept here, and not measured again")
    cli.add_base_flags(add, dtype="float32", seeds="random weights (--random-init)")


def run(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Measure, print; returns the figures."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.model, stand_in=args.random_init)
    model = load_variator(args)
    model.load_plugin(args.plugin, NAME)
    model.set_plugin(NAME)
    config = model.plugin().config
    length = args.context + (args.continuation if model.is_decoder else 0)
    windows = read_windows(args.data, tokenizer, seq_length=length, data_dir=args.data_dir)
    windows = spread(enough(windows, args.windows, args.data), args.windows)
    prompts = windows[:, : args.context]
    figures: dict[str, Any] = {
        "model": args.model,
        "plugin": args.plugin,
        "config": config.to_dict(),
        "data": args.data,
        "windows": len(windows),
        "context": args.context,
        "continuation": length - args.context,
        **observed(model, prompts, args.batch_size),
        "drift": drift(model, prompts, args.batch_size),
    }
    if model.is_decoder:
        losses = token_losses(model, windows, args.context, args.batch_size)
        figures["tokens"] = by_category(
            losses,
            windows,
            args.context,
            _merged(config, args.context),
            lambda ids: str(tokenizer.decode(ids)),
        )
        if args.sensitivity_windows:
            figures["sensitivity"] = sensitivity(
                model, windows[: args.sensitivity_windows], args.context, args.batch_size, args.work
            )
    _print(figures)
    if args.json:
        command = ["llm_variator.analyze", *argv]
        write_result(args.json, figures, command=command, seed=args.seed, started=started)
        print(f"stored in {args.json}")
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
    batches = prompts.split(batch_size)
    with Progress(transient=True) as progress:
        task = progress.add_task("merge", total=len(batches))
        with torch.inference_mode(), observer.watching():
            for batch in batches:
                read(model, batch)
                progress.advance(task)
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
            site: mean([each["last_wins"] for each in layers.values()]) for site, layers in weights.items()
        },
        "reconstruction": {
            str(layer): {
                "restored": mean(found.mean),
                "copied": mean(observer.copied[layer].mean),
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
        if site in ("ffn", "kv"):
            k = Counter(own.k for (name, _), own in plugin.sites.items() if name == site).most_common(1)[0][0]
            harms = measure_layers(probe, template, site, [k])
            found[site] = {"k": k, "divergence": [each.get(k) for each in harms]}
    return found


def _merged(config: VariatorConfig, context: int) -> range:
    """Positions of a prompt that some layer merges."""
    least = config.k if isinstance(config.k, int) else min(config.k.values())
    part = split(context, least, *config.ends)
    return range(part.head, context - part.tail)


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
