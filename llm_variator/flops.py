"""`python -m llm_variator.flops`: what a plugin saves, by arithmetic alone, for any model shape and length.

Decoders: operations and KV entries of reading a prompt. T5 and BERT: operations and parameters beside the paper's
baselines (its Table 1), token pruning and a smaller student.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from llm_variator import cli
from llm_variator.baselines import make_student
from llm_variator.cli import REQUIRED, flag, flags, spelled
from llm_variator.cli.values import PositiveInt, Share
from llm_variator.config import CONFIG_FILE, VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.measures import tables
from llm_variator.measures.operations import (
    Cost,
    EncoderShape,
    Stack,
    encoding,
    ffn_parameters,
    ffn_share_left,
    parameters,
    prefill,
)
from llm_variator.measures.paper import table_1
from llm_variator.measures.results import write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model, plugin_folder

_PAPER_ROWS = {"Variator": "plugin", "LTP": "token pruning", "Distillation": "student"}
PAPER_TOKENS, PAPER_KEEP = 512, 0.25


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Encoders: what T5 and BERT are compared with."""

    answer: PositiveInt | None = flag(None, "tokens that T5's decoder reads (default: 2)")
    keep: Share | None = flag(None, "token pruning's share per FFN (default: 0.25)")
    student_ffn: Share | None = flag(
        None, "inner width of the student's FFNs (default: 0.25; with --student-layers: 1)", metavar="SHARE"
    )
    student_layers: tuple[PositiveInt, ...] = flag((), "of its encoder and decoder", metavar="N")

    def encoder_flags_given(self) -> list[str]:
        """The flags of this group (with their dashes) that the user or the recipe gave."""
        return [spelled(field.name) for field in dataclasses.fields(Encoders) if getattr(self, field.name)]

    def __post_init__(self) -> None:
        if len(self.student_layers) > 2:
            raise VariatorError("--student-layers takes one number for the encoder and one for the decoder")


@dataclass(frozen=True, kw_only=True)
class Settings(flags.PluginConfig, Encoders, flags.Stored):
    """Operations, parameters and KV entries, dense and with a plugin, by arithmetic alone."""

    model: str = flag(REQUIRED, "whose shape: alias, local folder or hub id")
    plugin: str | None = flag(None, "shipped name, folder or hub id, instead of the group Plugin below")
    tokens: tuple[PositiveInt, ...] = flag(
        (), "prompt lengths (default: 512 2048 8192 for decoders, 512 for encoders)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plugin and (given := self.plugin_flags_given()):
            raise VariatorError(f"--plugin has its own configuration: leave out {', '.join(given)}")

    def plugin_config(self) -> VariatorConfig:
        """The configuration of --plugin, or that of the flags."""
        if self.plugin:
            return VariatorConfig.from_json(plugin_folder(self.plugin) / CONFIG_FILE)
        return super().plugin_config()


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives."""
    return cli.read(Settings, argv, prog="python -m llm_variator.flops")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and store the figures."""
    started = time.perf_counter()
    settings = read(argv)
    base = load_model(settings.model, random_init=True, device="meta")
    whole = parameters(base)
    model = VariatorModel(base, settings.plugin_config())
    config = model.plugins["default"]
    figures: dict[str, Any] = {"model": settings.model, "config": config.to_dict()}
    figures["parameters"] = {"model": whole, "plugin": parameters(model.plugin())}
    if model.is_decoder:
        if given := settings.encoder_flags_given():
            raise VariatorError(
                f"{', '.join(given)}: for T5 and BERT alone; what a decoder keeps of keys is for --k and --k-per-head"
            )
        stack = Stack.of(base.config)
        rows = {
            n: (prefill(stack, n), prefill(stack, n, config)) for n in settings.tokens or [512, 2048, 8192]
        }
        _print(settings.model, rows, figures["parameters"])
        figures["prompts"] = {
            str(n): dict(zip(("dense", "plugin"), map(_figures, costs), strict=True))
            for n, costs in rows.items()
        }
    else:
        _encoder(settings, base, config, figures)
    if settings.json is not None:
        command = ["llm_variator.flops", *(sys.argv[1:] if argv is None else argv)]
        write_result(settings.json, figures, command=command, seed=None, started=started)


def _figures(cost: Cost) -> dict[str, int]:
    return {**dataclasses.asdict(cost), "total": cost.total}


def _encoder(
    settings: Settings, base: PreTrainedModel, config: VariatorConfig, figures: dict[str, Any]
) -> None:
    """Print how dense, plugin and baselines compare, and add it to `figures`."""
    with torch.device("meta"):
        student = make_student(base, *settings.student_layers, ffn=settings.student_ffn)
    shape, small = EncoderShape.of(base.config), EncoderShape.of(student.config)
    counts = figures["parameters"]
    counts |= {"dense": counts["model"], "token pruning": counts["model"], "student": parameters(student)}
    answer = (settings.answer or 2) if shape.decoder_layers else 0
    keep = settings.keep or PAPER_KEEP
    figures |= {"answer": answer, "keep": keep, "prompts": {}}
    paper = _papers_costs(settings.model) if _is_papers(settings, config) else {}
    for n in settings.tokens or [PAPER_TOKENS]:
        costs = {
            "dense": encoding(shape, n, answer=answer),
            "plugin": encoding(shape, n, answer=answer, plugin=config),
            "token pruning": encoding(shape, n, answer=answer, keep=keep),
            "student": encoding(small, n, answer=answer),
        }
        dense = costs["dense"]
        figures["prompts"][str(n)] = {
            name: {
                **_figures(cost),
                "encoder_of_dense": round(cost.encoder / dense.encoder, 6),
                "of_dense": round(cost.total / dense.total, 6),
                "parameters_of_model": round(counts[name] / counts["model"], 6),
            }
            for name, cost in costs.items()
        }
        _print_encoder(settings.model, n, answer, costs, counts, paper if n == PAPER_TOKENS else {})
    if paper:
        figures["paper"] = _papers_count(config, shape, paper)
        _print_papers_count(figures["paper"])


def _papers_costs(model: str) -> dict[str, tuple[float, float]]:
    """Parameters and operations in Table 1 of the paper, in per cent of the original's."""
    rows = table_1(model)
    return {
        ours: (rows[name]["parameters"], rows[name]["operations"])
        for name, ours in _PAPER_ROWS.items()
        if name in rows
    }


def _is_papers(settings: Settings, config: VariatorConfig) -> bool:
    ours = dataclasses.replace(config, base=None)
    papers = dataclasses.replace(VariatorConfig(k=4), dense_head=0, dense_tail=0)
    student = not settings.student_layers and settings.student_ffn in (None, PAPER_KEEP)
    return ours == papers and settings.keep in (None, PAPER_KEEP) and student


def _print_encoder(
    model: str,
    n: int,
    answer: int,
    costs: Mapping[str, Cost],
    counts: Mapping[str, int],
    paper: Mapping[str, tuple[float, float]],
) -> None:
    title = f"{model}: reading {n:,} tokens" + (f" and {answer} of an answer" if answer else "") + ", GFLOP"
    dense = costs["dense"]
    rows: list[tuple[str, ...]] = [
        ("FFN", *(f"{cost.ffn / 1e9:,.1f}" for cost in costs.values())),
        ("Q, K, V, O", *(f"{cost.projections / 1e9:,.1f}" for cost in costs.values())),
        ("scores", *(f"{cost.scores / 1e9:,.1f}" for cost in costs.values())),
        ("plugin", *(f"{cost.plugin / 1e9:,.1f}" for cost in costs.values())),
        ("encoder, of dense", *(f"{cost.encoder / dense.encoder:.1%}" for cost in costs.values())),
    ]
    if answer:
        rows += [
            ("decoder", *(f"{(cost.answer + cost.head) / 1e9:,.1f}" for cost in costs.values())),
            ("all, of dense", *(f"{cost.total / dense.total:.1%}" for cost in costs.values())),
        ]
    rows.append(("parameters", *(_added(name, f"{counts[name] / counts['model']:.1%}") for name in costs)))
    papers: list[tuple[str, ...]] = []
    if paper:
        columns = [(name, *paper.get(name, (100.0, 100.0))) for name in costs]
        papers = [
            ("paper: FLOPs", *(f"{operations}%" for _, _, operations in columns)),
            ("paper: parameters", *(_added(name, f"{share}%") for name, share, _ in columns)),
        ]
    tables.show(title, ["", *costs], rows, papers, left=0)


def _added(name: str, share: str) -> str:
    """A plugin's parameters come on top of the model's; the others are models themselves."""
    return f"+{share}" if name == "plugin" else share


def _papers_count(
    config: VariatorConfig, shape: EncoderShape, paper: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """The paper's own formula, and what its column of operations implies: why that column is not ours."""
    assert isinstance(config.k, int)
    left = ffn_share_left(config.k, config.r, shape.dim)
    rows = {"plugin": left, "token pruning": PAPER_KEEP}
    cost = encoding(shape, PAPER_TOKENS)
    return {
        "table_1": {
            name: dict(zip(("parameters", "flops"), row, strict=True)) for name, row in paper.items()
        },
        "ffn_operations_saved": round(1 - left, 6),
        "ffn_parameters_added": round(ffn_parameters(config.k, config.r, shape.dim) / shape.ffn_weights, 6),
        "ffn_share_implied": {
            name: round((1 - paper[name][1] / 100) / (1 - now), 6) for name, now in rows.items()
        },
        "ffn_share_of_encoder": round(cost.ffn / cost.encoder, 6),
        "ffn_share_without_scores": round(cost.ffn / (cost.ffn + cost.projections), 6),
    }


def _print_papers_count(count: Mapping[str, Any]) -> None:
    implied = [f"{share:.1%}" for share in count["ffn_share_implied"].values()]
    Console().print(
        f"One FFN by the paper's own formula (section 3.4): {count['ffn_operations_saved']:.1%} of its operations "
        f"saved, {count['ffn_parameters_added']:.1%} more parameters. With it, the paper's FLOPs of plugin and token "
        f"pruning ask FFNs to be {' and '.join(implied)} of all operations. They are "
        f"{count['ffn_share_of_encoder']:.1%} of this encoder's, {count['ffn_share_without_scores']:.1%} without the "
        "attention scores, and less with the decoder; the paper does not say what it counts.",
        highlight=False,
        soft_wrap=True,
    )


def _print(model: str, rows: dict[int, tuple[Cost, Cost]], counts: Mapping[str, int]) -> None:
    columns = (
        "tokens", "", "FFN", "K, V\nQ, O", "scores", "plugin", "all", "of\ndense", "KV of\ndense",
    )  # fmt: skip
    cells = []
    for n, costs in rows.items():
        for name, cost in zip(("dense", "plugin"), costs, strict=True):
            parts = (cost.ffn, cost.projections, cost.scores, cost.plugin, cost.total)
            cells.append(
                (
                    f"{n:,}" if name == "dense" else "",
                    name,
                    *(f"{part / 1e12:.3f}" for part in parts),
                    f"{cost.total / costs[0].total:.3f}",
                    f"{cost.cache_entries / costs[0].cache_entries:.3f}",
                )
            )
    tables.show(f"{model}: reading one prompt, TFLOP", columns, cells, left=0)
    share = counts["plugin"] / counts["model"]
    Console().print(f"plugin: {counts['plugin']:,} parameters, {share:.2%} of the model's", highlight=False)


if __name__ == "__main__":
    cli.run(main)
