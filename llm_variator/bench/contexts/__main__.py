"""`python -m llm_variator.bench.contexts load|questions|prefill|rounding|decode|pool`: what contexts save, measured."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_variator import old_cli as cli
from llm_variator.bench.contexts import ageing, memory, pool, reuse, rounding
from llm_variator.bench.contexts.setting import build_model
from llm_variator.measures.results import write_result
from llm_variator.sources.corpora import EMBEDDED

_COMMANDS = {
    "load": reuse.load,
    "questions": reuse.questions,
    "prefill": memory.prefill,
    "rounding": rounding.rounding,
    "decode": ageing.decode,
    "pool": pool.pool,
}
_PARTS = {
    "answer_from": reuse.answer_from,
    "memory_of": memory.memory_of,
}  # in a process of their own, by flag


def build_parser() -> cli.Parser:
    """Every sub-command and its flags."""
    parser = cli.Parser(prog="python -m llm_variator.bench.contexts", description="Measure contexts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **sizes: int) -> Any:
        add = commands.add_parser(name, help=text, description=text).add_argument
        add("--model", default="smollm2-135m", help="base model: alias, local folder or hub id")
        add("--plugin", default="smollm2-135m/k2", help="shipped name, folder or hub id")
        add("--data", default=EMBEDDED, metavar="SOURCE", help="text, named as in llm_variator.train")
        add("--data-dir", type=Path, help="folder of local data sets (default: $VARIATOR_DATA)")
        add("--device", default="cpu", help="cpu, cuda, ...")
        add(
            "--random-init",
            action="store_true",
            help="the model's shape with random weights, an untrained plugin",
        )
        add("--num-layers", type=cli.positive_int, help="with --random-init: this many layers")
        add("--dtype", default="float32", help="of base model and plugin")
        add("--seed", type=cli.natural, default=0, help="of random choices")
        add("--json", type=Path, metavar="FILE", help="store the figures with command, versions and machine")
        for size, value in sizes.items():
            add(f"--{size.replace('_', '-')}", type=cli.positive_int, default=value, help=_SIZES[size])
        return add

    add = command(
        "load",
        "save here, load and go on in another process; time of loading against a dense prefill",
        context=4096,
        question=16,
        new_tokens=32,
        repeats=3,
    )
    add("--answer-from", type=Path, help=argparse.SUPPRESS)
    command(
        "questions",
        "questions on one context, against as many dense prefills; memory of the context",
        context=4096,
        question=16,
        new_tokens=8,
        questions=50,
        repeats=3,
    )
    chunks = dict(type=cli.positive_int, nargs="+", default=[64, 100, 256], help="tokens read at a time")
    add = command("prefill", "peak memory of activations, whole and in chunks")
    add("--chunks", **chunks)
    add("--lengths", type=cli.positive_int, nargs="+", default=[1024, 4096, 8192], help="tokens of a prompt")
    add("--memory-of", type=cli.natural, nargs=2, metavar=("TOKENS", "CHUNK"), help=argparse.SUPPRESS)
    add = command(
        "rounding", "errors of chunked and whole prefill against the same model in fp64", context=700
    )
    add("--chunks", **chunks)
    add("--ratios", type=cli.positive_int, nargs="+", default=[2, 3, 4, 8], help="k of untrained plugins")
    add = command(
        "decode",
        "a text read token by token as if generated: entries held, cross-entropy against dense",
        context=512,
        new_tokens=2000,
        repeats=1,
    )
    add("--decode-block", type=cli.positive_int, default=64, help="tokens merged at a time")
    command(
        "pool",
        "sessions over shared documents in one pool, against contexts that share nothing",
        documents=10,
        sessions=100,
        operations=2000,
        context=64,
        blocks=60000,
        block_size=16,
    )
    return parser


_SIZES = {
    "context": "tokens of a document",
    "question": "tokens of a question",
    "new_tokens": "tokens generated after it",
    "repeats": "timed runs; the least is taken",
    "questions": "how many",
    "documents": "how many",
    "sessions": "most at a time",
    "operations": "random extends, forks, frees and questions",
    "blocks": "in the pool",
    "block_size": "entries in a block",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement, print its figures and store them."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = cli.parse(build_parser(), argv)
    model = build_model(args)
    part = next((run for flag, run in _PARTS.items() if getattr(args, flag, None)), None)
    with torch.inference_mode():
        if part is not None:
            print(json.dumps(part(model, args)))
            return
        figures = _COMMANDS[args.command](model, args)
    plugin = "untrained k=2" if args.random_init else args.plugin
    figures = {"model": args.model, "plugin": plugin, "dtype": args.dtype, **figures}
    print(json.dumps(figures, indent=2))
    if args.json:
        command = ["llm_variator.bench.contexts", *argv]
        write_result(args.json, figures, command=command, seed=args.seed, started=started)


if __name__ == "__main__":
    cli.run(main)
