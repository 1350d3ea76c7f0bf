"""`python -m llm_variator.flops`: what a plugin saves, by arithmetic alone, for any model shape and length.

Counts floating-point operations of matrix products (a multiply-add is two), as torch's `FlopCounterMode` does:
norms, softmax, activations and sums are left out. One prompt, batch 1; nothing is loaded or run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from llm_variator import cli
from llm_variator.config import CONFIG_FILE, BaseSignature, VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.groups import Split, split
from llm_variator.loading import load_config, plugin_folder
from llm_variator.results import write_result


@dataclasses.dataclass(frozen=True)
class Stack:
    """The shape of a decoder's layers; the numbers of weights are per layer and count matrices only."""

    layers: int
    dim: int
    ffn_weights: int
    query_weights: int
    """Of the query and output projections, which every token passes."""
    key_value_weights: int
    attention_width: int
    """Query heads times their width."""
    key_value_width: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None: full attention."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Stack:
        """Read a shape from a LLaMA-like configuration; raises VariatorError for another kind."""
        try:
            dim, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
            kv_heads, inner = config.num_key_value_heads, config.intermediate_size
        except AttributeError as error:
            raise VariatorError(
                f"cannot count the operations of model type {config.model_type!r}: {error}; decoders built like "
                "LLaMA can be counted"
            ) from None
        width = getattr(config, "head_dim", None) or dim // heads
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["full_attention" if window is None else "sliding_attention"] * layers
        return cls(
            layers=layers,
            dim=dim,
            ffn_weights=3 * dim * inner,
            query_weights=2 * dim * heads * width,
            key_value_weights=2 * dim * kv_heads * width,
            attention_width=heads * width,
            key_value_width=kv_heads * width,
            vocabulary=config.vocab_size,
            windows=tuple(None if kind == "full_attention" else window for kind in kinds),
        )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations of one prefill, and what it leaves in the cache."""

    ffn: int = 0
    projections: int = 0
    scores: int = 0
    """Query-key and weight-value products."""
    plugin: int = 0
    head: int = 0
    """Next-token logits of the last token."""
    cache_entries: int = 0
    """Sum over the layers."""

    @property
    def total(self) -> int:
        """All operations."""
        return self.ffn + self.projections + self.scores + self.plugin + self.head

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(ours + theirs for ours, theirs in pairs))


def prefill(stack: Stack, n: int, plugin: VariatorConfig | None = None, *, causal: bool = True) -> Cost:
    """Cost of reading a prompt of `n` tokens.

    Args:
        stack: the model's shape.
        n: prompt tokens.
        plugin: with `dense_head` and `dense_tail` set; None: the base model.
        causal: count the scores that causality leaves; False: the whole rectangle of queries and entries, as
            the eager attention of transformers computes (and `FlopCounterMode` counts) it.
    """
    total = Cost(head=2 * stack.dim * stack.vocabulary)
    for layer in range(stack.layers):
        slides = stack.windows[layer] is not None
        ffn = _split(plugin, "ffn", layer, n)
        kv = None if slides else _split(plugin, "kv", layer, n)
        whole = None if slides else _split(plugin, "attention", layer, n)
        entries = whole or kv or (1, Split(0, 0, n))
        queries = whole[1].entries if whole else n
        seen = _seen(entries, queries, stack.windows[layer]) if causal else queries * entries[1].entries
        total += Cost(
            ffn=2 * stack.ffn_weights * (ffn[1].entries if ffn else n),
            projections=2 * stack.query_weights * queries + 2 * stack.key_value_weights * entries[1].entries,
            scores=2 * 2 * stack.attention_width * seen,
            plugin=sum(
                _plugin_cost(plugin, stack.dim, *part, restores=restores)
                for part, restores in ((ffn, True), (kv, False), (whole, True))
                if plugin and part
            ),
            cache_entries=entries[1].entries if not slides else min(n, stack.windows[layer] or n),
        )
    return total


def _split(plugin: VariatorConfig | None, site: str, layer: int, n: int) -> tuple[int, Split] | None:
    """Ratio and split of a site; None where it is dense."""
    k = plugin.ratio(site, layer) if plugin else None
    if plugin is None or k is None:
        return None
    assert plugin.dense_head is not None, "resolve the configuration first"
    assert plugin.dense_tail is not None
    return k, split(n, k, plugin.dense_head, plugin.dense_tail)


def _seen(entries: tuple[int, Split], queries: int, window: int | None) -> int:
    """Number of (query, entry) pairs that causality leaves."""
    k, (head, groups, tail) = entries
    if queries == head + groups + tail:  # each query is an entry
        if window is None or window >= queries:
            return queries * (queries + 1) // 2
        return window * (window + 1) // 2 + (queries - window) * window
    in_groups = k * (groups * head + groups * (groups + 1) // 2)
    in_tail = tail * (head + groups) + tail * (tail + 1) // 2
    return head * (head + 1) // 2 + in_groups + in_tail


def _plugin_cost(plugin: VariatorConfig, dim: int, k: int, part: Split, *, restores: bool) -> int:
    """Merge and restore of one site: the fused form of `layers`, cheaper than the paper's count."""
    tokens, cost = part.groups * k, 0
    if k > 1 and plugin.compressor == "weighted":
        cost += 2 * dim * k * tokens + 2 * dim * tokens  # scores; weighted sum
    if restores and plugin.decompressor == "adapter":
        cost += 2 * dim * plugin.r * (part.groups + 2 * tokens)  # down from g; down from h and up
    return cost


def build_parser() -> cli.Parser:
    """Every flag of the command."""
    parser = cli.Parser(
        prog="python -m llm_variator.flops",
        description="Operations and KV entries of reading a prompt, dense and with a plugin, by arithmetic alone.",
    )
    add = parser.add_argument
    add("--model", required=True, help="whose shape: alias, local folder or hub id")
    add("--plugin", metavar="PLUGIN", help="shipped name, folder or hub id, instead of the flags below")
    add("--tokens", type=cli.positive_int, nargs="+", default=[512, 2048, 8192], help="prompt lengths")
    add("--json", type=Path, metavar="FILE", help="store the figures with command and versions")
    cli.add_variator_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and store the figures."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = cli.parse(build_parser(), argv)
    shape = load_config(args.model)
    stack = Stack.of(shape)
    plugin = _plugin_config(args, shape)
    rows = {n: (prefill(stack, n), prefill(stack, n, plugin)) for n in args.tokens}
    _print(args.model, rows)
    if args.json:
        figures: dict[str, Any] = {
            "model": args.model,
            "config": plugin.to_dict(),
            "prompts": {
                str(n): {
                    name: {**dataclasses.asdict(cost), "total": cost.total}
                    for name, cost in zip(("dense", "plugin"), costs, strict=True)
                }
                for n, costs in rows.items()
            },
        }
        command = ["llm_variator.flops", *argv]
        write_result(args.json, figures, command=command, seed=None, started=started)


def _plugin_config(args: argparse.Namespace, shape: PreTrainedConfig) -> VariatorConfig:
    """The plugin's configuration, its defaults filled in for this shape."""
    if args.plugin:
        if given := cli.variator_flags_given(args):
            raise VariatorError(f"--plugin has its own configuration: leave out {', '.join(given)}")
        config = VariatorConfig.from_json(plugin_folder(args.plugin) / CONFIG_FILE)
    else:
        config = cli.variator_config_from(args)
    base = BaseSignature(args.model, shape.model_type, shape.hidden_size, shape.num_hidden_layers)
    return config.resolved(base, decoder=True)


def _print(model: str, rows: dict[int, tuple[Cost, Cost]]) -> None:
    table = Table(title=f"{model}: reading one prompt, TFLOP")
    for heading in (
        "tokens",
        "",
        "FFN",
        "K, V\nQ, O",
        "scores",
        "plugin",
        "all",
        "of\ndense",
        "KV of\ndense",
    ):
        table.add_column(heading, justify="right")
    for n, costs in rows.items():
        for name, cost in zip(("dense", "plugin"), costs, strict=True):
            parts = (cost.ffn, cost.projections, cost.scores, cost.plugin, cost.total)
            table.add_row(
                f"{n:,}" if name == "dense" else "",
                name,
                *(f"{part / 1e12:.3f}" for part in parts),
                f"{cost.total / costs[0].total:.3f}",
                f"{cost.cache_entries / costs[0].cache_entries:.3f}",
            )
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
