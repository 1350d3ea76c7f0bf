"""`python -m llm_variator.evaluate`: text continued after a compressed prompt, the paper's tasks, lm-eval's tasks."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_variator import old_cli as cli
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


def build_parser() -> cli.Parser:
    """Every sub-command and its flags."""
    parser = cli.Parser(prog="python -m llm_variator.evaluate", description="Measure the quality of plugins.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    continuation = commands.add_parser(
        "continuation",
        help="cross-entropy of a text's continuation: prompt dense, absent, and compressed by each plugin",
        description="Cross-entropy of a text's continuation (teacher forcing, nats per token) after the same "
        "prompt: dense, absent (its last token only), and compressed by each plugin.",
    )
    add = continuation.add_argument
    add("--model", required=True, help="base model: alias, local folder or hub id")
    add(
        "--plugin",
        nargs="+",
        default=[],
        metavar="PLUGIN",
        help="shipped name, folder or hub id; none: no plugin",
    )
    add("--untrained", action="store_true", help="also score each plugin's configuration before any training")
    cli.add_text_flags(add, data=EMBEDDED, windows=16, batch_size=4)
    add("--context", type=cli.positive_int, default=512, help="prompt tokens")
    add("--continuation", type=cli.positive_int, default=128, help="tokens scored after the prompt")
    cli.add_quantize_flag(add)
    cli.add_base_flags(add, seeds="random weights (--random-init, --untrained)")
    task.add_flags(
        commands.add_parser(
            "task",
            help="score on one of the paper's seven tasks: a model as it is, or with a plugin",
            description="Score on the validation split of one of the paper's seven tasks, in percent.",
        )
    )
    frontier.add_flags(
        commands.add_parser(
            "frontier",
            help="quality against cost: plugins beside dropped tokens, skipped layers and untrained merging",
            description="Quality against cost: the text after a prompt and answers to questions, with the prompt "
            "dense, absent, compressed by plugins, and made cheaper in ways that need no training.",
        )
    )
    sensitivity.add_flags(
        commands.add_parser(
            "sensitivity",
            help="one compression ratio per layer, by measured sensitivity under a budget",
            description="Merge each layer alone, untrained, at each ratio; then choose one ratio per layer with the "
            "least harm under a budget, and print it as the flags to train with.",
        )
    )
    commands.add_parser(
        "harness",
        add_help=False,
        help="lm-eval's tasks and flags, one run or plugins side by side; `harness` itself may be left out",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one evaluation, print its table and store its figures."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and (argv[0] == "harness" or (argv[0].startswith("-") and argv[0] not in ("-h", "--help"))):
        harness.main(argv[1:] if argv[0] == "harness" else argv)
        return
    args = cli.parse(build_parser(), argv)
    if args.command == "task":
        task.run(args, argv)
        return
    if args.command in ("frontier", "sensitivity"):
        (frontier if args.command == "frontier" else sensitivity).run(args, argv)
        return
    windows = _windows(args)
    model = load_variator(args)
    model.decoder_only("continuation", "it scores the text after a prompt")
    plugins = _attach(model, [name for name in args.plugin if name != "none"], args)
    scores = score_continuation(model, windows, args.context, plugins, batch_size=args.batch_size)
    _print(scores, args, len(windows))
    if args.json:
        figures = {
            "model": args.model,
            "data": args.data,
            "context": args.context,
            "continuation": args.continuation,
            "windows": len(windows),
            "scores": [dataclasses.asdict(score) for score in scores],
            "configs": {label: model.plugins[name].to_dict() for name, label in plugins.items()},
        }
        command = ["llm_variator.evaluate", *argv]
        write_result(args.json, figures, command=command, seed=args.seed, started=started)
        print(f"stored in {args.json}")


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


def _windows(args: argparse.Namespace) -> Tensor:
    tokenizer = load_tokenizer(args.model, stand_in=args.random_init)
    length = args.context + args.continuation
    windows = read_windows(args.data, tokenizer, seq_length=length, data_dir=args.data_dir)
    return spread(enough(windows, args.windows, args.data), args.windows)


def _attach(model: VariatorModel, names: Sequence[str], args: argparse.Namespace) -> dict[str, str]:
    """Load the plugins and, where asked for, untrained ones of the same configuration."""
    labels: dict[str, str] = {}
    for number, name in enumerate(names):
        model.load_plugin(name, f"plugin{number}")
        labels[f"plugin{number}"] = name
        if args.untrained:
            torch.manual_seed(args.seed)
            model.add_plugin(f"untrained{number}", model.plugins[f"plugin{number}"])
            labels[f"untrained{number}"] = f"{name} (untrained)"
    return labels


def _print(scores: Sequence[Score], args: argparse.Namespace, windows: int) -> None:
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
        f"{args.model} on {args.data}: the {args.continuation} tokens after {args.context}, {windows} windows",
        ("prompt", "nats/token", "above dense", "KV entries"),
        rows,
    )


if __name__ == "__main__":
    cli.run(main)
