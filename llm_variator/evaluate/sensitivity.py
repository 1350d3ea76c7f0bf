"""`python -m llm_variator.evaluate sensitivity`: one compression ratio per layer, by measurement, under a budget.

Every layer is merged alone at every ratio, untrained or with its adapter set by least squares, and the harm to the
dense model's predictions measured. Harms are then taken as additive, which they are not quite, and the ratios with the
least sum chosen exactly.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import Natural, PositiveInt
from llm_variator.config import VariatorConfig
from llm_variator.engine.hooks import architecture_of
from llm_variator.errors import VariatorError
from llm_variator.evaluate.probe import Probe, open_probe
from llm_variator.measures import tables
from llm_variator.measures.loading import load_variator
from llm_variator.measures.operations import Stack, prefill
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import enough, read_windows, repeat_passages, spread
from llm_variator.sources.models import load_tokenizer

WORK = Path("runs/sensitivity")
SITES = ("ffn", "kv")


@dataclasses.dataclass(frozen=True)
class Option:
    """One ratio that one layer can have."""

    k: int
    """1: the layer stays dense."""
    cost: int
    """Operations of the FFN and its plugin, or KV entries."""
    harm: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(flags.Stored, flags.Text, flags.BaseModel):
    """One compression ratio per layer, by measured sensitivity under a budget.

    Merge each layer alone, untrained, at each ratio; then choose one ratio per layer with the least harm under a
    budget, and print it as the flags to train with.
    """

    model: str = flag(REQUIRED, "decoder: alias, local folder or hub id")
    budget: tuple[str, ...] = flag(
        ("ffn=0.5",),
        "what may be left of the dense model's: ffn, operations of FFNs with their plugins; kv, KV entries",
        metavar="SITE=SHARE",
    )
    ratios: tuple[PositiveInt, ...] = flag((2, 4, 8, 16), "tried in every layer")
    fitted: Natural = flag(
        0,
        "set the adapters of FFNs by least squares over so many tokens of other windows (default: untrained)",
        metavar="TOKENS",
    )
    recall: bool = flag(
        False, "compare predictions of passages repeated from the prompt, not of what follows it"
    )
    r: PositiveInt = flag(64, "bottleneck width")
    dense_head: Natural = flag(4, "first prompt tokens kept uncompressed")
    dense_tail: Natural = flag(64, "least number of last prompt tokens kept uncompressed")
    data: str = "wikitext2/train"
    windows: PositiveInt = 4
    context: PositiveInt = flag(512, "prompt tokens")
    continuation: PositiveInt = flag(128, "tokens whose predictions are compared")
    work: Path = flag(WORK, "what is measured is kept here, and not measured again")

    def __post_init__(self) -> None:
        self.budgets()
        if set(self.ratios) <= {1}:
            raise VariatorError("--ratios needs at least one ratio above 1")

    def budgets(self) -> dict[str, float]:
        """`("ffn=0.5", "kv=0.25")` -> shares by site."""
        found = {}
        for text in self.budget:
            site, _, share = text.partition("=")
            try:
                found[site] = float(share)
            except ValueError:
                found[site] = 0.0
            if site not in SITES or not 0 < found[site] < 1:
                raise VariatorError(
                    f"--budget {text}: write ffn=SHARE or kv=SHARE, with a share above 0 and below 1"
                )
        return {site: found[site] for site in SITES if site in found}


def run(settings: Settings, argv: Sequence[str]) -> dict[str, Any]:
    """Measure every layer, choose, print; returns the figures."""
    started = time.perf_counter()
    budgets, ratios = settings.budgets(), sorted(set(settings.ratios) - {1})
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    length = settings.context + settings.continuation
    windows = read_windows(settings.data, tokenizer, seq_length=length, data_dir=settings.data_dir)
    windows = enough(windows, settings.windows, settings.data)
    model = load_variator(settings)
    model.decoder_only("sensitivity", "it measures what follows a prompt")
    measured, rest = _apart(windows, settings.windows)
    if settings.recall:
        draw = np.random.default_rng(settings.seed)
        measured = torch.stack([repeat_passages(window, settings.context, draw) for window in measured])
    fitting = rest[: -(-settings.fitted // length)]
    if len(fitting) * length < settings.fitted:
        raise VariatorError(
            f"--fitted {settings.fitted}: {settings.data} holds only {len(rest) * length} tokens more"
        )
    probe = open_probe(model, measured, settings.context, settings.batch_size, settings.work, fitting)

    template = VariatorConfig(
        r=settings.r,
        dense_head=settings.dense_head,
        dense_tail=settings.dense_tail,
        compressor="mean",
        decompressor="adapter" if settings.fitted else "copy",
    )
    stack = Stack.of(model.config)
    harms: dict[str, list[dict[int, float]]] = {}
    chosen: dict[str, list[int]] = {}
    left: dict[str, float] = {}
    for (
        site,
        share,
    ) in budgets.items():  # costs are arithmetic: what cannot be met is said before the measuring
        options = layer_options(stack, settings.context, template, site, _harmless(model, site, ratios))
        choose(options, int(share * sum(layer[0].cost for layer in options)))
    for site, share in budgets.items():
        harms[site] = measure_layers(probe, template, site, ratios)
        options = layer_options(stack, settings.context, template, site, harms[site])
        whole = sum(layer[0].cost for layer in options)
        picks = choose(options, int(share * whole))
        chosen[site] = [option.k for option in picks]
        left[site] = sum(option.cost for option in picks) / whole
    config = dataclasses.replace(template, sites=tuple(budgets), k_per_layer=chosen)
    together = probe.harm(config)
    dense = probe.dense_cross_entropy
    _print(harms, chosen, ratios)
    trained = dataclasses.replace(config, compressor="weighted", decompressor="adapter")
    how = f"least squares over {settings.fitted} tokens" if settings.fitted else "untrained"
    operations = prefill(stack, settings.context, trained).total / prefill(stack, settings.context).total
    shares = ", ".join(f"{_RESOURCE[site]} {share:.3f}" for site, share in left.items())
    Console().print(
        f"left of dense: {shares}, all operations {operations:.3f}; {how}: {together.divergence:.4f} nats from the "
        f"dense predictions, cross-entropy {together.cross_entropy:.4f}, dense {dense:.4f}",
        highlight=False,
        soft_wrap=True,
    )
    print(f"--sites {','.join(budgets)} --k-per-layer '{json.dumps(chosen)}'")
    figures = {
        "model": settings.model,
        "data": settings.data,
        "windows": settings.windows,
        "context": settings.context,
        "continuation": settings.continuation,
        "budget": budgets,
        "divergence": harms,
        "k_per_layer": chosen,
        "left": left | {"operations": operations},
        "recall": settings.recall,
        "fitted_tokens": settings.fitted,
        "together": dataclasses.asdict(together) | {"dense_cross_entropy": dense},
    }
    if settings.json:
        command = ["llm_variator.evaluate", *argv]
        write_result(settings.json, figures, command=command, seed=settings.seed, started=started)
    return figures


_RESOURCE = {"ffn": "FFN operations", "kv": "KV entries"}


def measure_layers(
    probe: Probe, template: VariatorConfig, site: str, ratios: Sequence[int]
) -> list[dict[int, float]]:
    """Divergence of merging `site` in one layer alone: layer -> ratio -> nats; empty where it cannot be merged."""
    return [
        {
            k: probe.harm(dataclasses.replace(template, sites=(site,), k=k, layers=(layer,))).divergence
            for k in merged
        }
        for layer, merged in enumerate(_harmless(probe.model, site, ratios))
    ]


def _harmless(model: VariatorModel, site: str, ratios: Sequence[int]) -> list[dict[int, float]]:
    """As `measure_layers`, of merging that costs nothing."""
    base: Any = model.base
    architecture = architecture_of(base)
    return [
        dict.fromkeys(ratios, 0.0) if site == "ffn" or not architecture.slides(base, layer) else {}
        for layer in range(model.signature.num_layers)
    ]


def layer_options(
    stack: Stack, n: int, template: VariatorConfig, site: str, harms: Sequence[Mapping[int, float]]
) -> list[list[Option]]:
    """Per layer its ratios with costs for a prompt of `n` tokens, the dense one first."""

    def cost(layer: int, config: VariatorConfig | None) -> int:
        one = dataclasses.replace(stack, layers=1, windows=stack.windows[layer : layer + 1])
        found = prefill(one, n, config)
        return found.ffn + found.plugin if site == "ffn" else int(found.cache_entries)

    return [
        [
            Option(1, cost(layer, None), 0.0),
            *(
                Option(
                    k,
                    cost(layer, VariatorConfig(
                        k=k, sites=(site,), r=template.r,
                        dense_head=template.dense_head, dense_tail=template.dense_tail,
                    )),
                    harm,
                )
                for k, harm in merged.items()
            ),
        ]
        for layer, merged in enumerate(harms)
    ]  # fmt: skip


def choose(layers: Sequence[Sequence[Option]], budget: int) -> list[Option]:
    """One option per layer with the least sum of harms within `budget`: exact, by dynamic programming.

    Raises:
        VariatorError: the cheapest options are too dear.
    """
    cheapest = [min(option.cost for option in options) for options in layers]
    if (least := sum(cheapest)) > budget:
        whole = sum(options[0].cost for options in layers)
        raise VariatorError(
            f"no ratios meet a budget of {budget / whole:.3f} of dense, {least / whole:.3f} is the least: raise "
            "--budget, give larger --ratios or a shorter --dense-tail"
        )
    rest = least
    best: dict[int, tuple[float, tuple[Option, ...]]] = {0: (0.0, ())}
    for options, low in zip(layers, cheapest, strict=True):
        rest -= low
        grown: dict[int, tuple[float, tuple[Option, ...]]] = {}
        for spent, (harm, picks) in best.items():
            for option in options:
                total, sum_ = spent + option.cost, harm + option.harm
                if total + rest <= budget and (total not in grown or sum_ < grown[total][0]):
                    grown[total] = sum_, (*picks, option)
        best, lowest = {}, float("inf")
        for total in sorted(grown):  # what costs more must harm less
            if grown[total][0] < lowest:
                best[total] = grown[total]
                lowest = grown[total][0]
    return list(min(best.values(), key=lambda found: found[0])[1])


def _apart(windows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` windows, evenly spread, and the others."""
    chosen = spread(torch.arange(len(windows)), count)
    others = torch.ones(len(windows), dtype=torch.bool)
    others[chosen] = False
    return windows[chosen], windows[others]


def _print(
    harms: Mapping[str, Sequence[Mapping[int, float]]],
    chosen: Mapping[str, Sequence[int]],
    ratios: Sequence[int],
) -> None:
    for site, layers in harms.items():
        rows = []
        for layer, merged in enumerate(layers):
            cells = (f"{merged[k]:.5f}" if k in merged else "-" for k in ratios)
            rows.append((str(layer), *cells, str(chosen[site][layer])))
        title = f"{site}: nats from the dense predictions with one layer merged"
        tables.show(title, ["layer", *(f"k={k}" for k in ratios), "chosen"], rows, left=0)
