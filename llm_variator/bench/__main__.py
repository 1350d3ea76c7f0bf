"""`python -m llm_variator.bench prefill|decode|compile|swap|train|memory|compare`: speed beside what bounds it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from llm_variator import old_cli as cli
from llm_variator.bench import compiling, formulations, reading, swapping, training
from llm_variator.bench.report import publish
from llm_variator.bench.setting import Setting, add_flags

_NOTES = {
    "prefill": reading.PREFILL_NOTE,
    "decode": reading.DECODE_NOTE,
    "compile": compiling.NOTE,
    "swap": swapping.NOTE,
    "train": training.TRAIN_NOTE,
    "memory": training.MEMORY_NOTE,
    "compare": formulations.NOTE,
}
_ROWS: dict[str, Callable[[Setting], list[dict[str, Any]]]] = {
    "prefill": reading.prefill_rows,
    "decode": reading.decode_rows,
    "compile": compiling.rows,
    "swap": swapping.rows,
    "train": training.train_rows,
    "compare": formulations.rows,
}


def build_parser() -> cli.Parser:
    """Every flag of every benchmark."""
    parser = cli.Parser(
        prog="python -m llm_variator.bench",
        description="Dense and plugins in turns, medians with quartiles, beside the bound that the remaining "
        "operations or bytes set.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, **defaults: str) -> cli.Parser:
        made = commands.add_parser(name, help=text, description=f"{text}. {_NOTES[name]}".replace("%", "%%"))
        add_flags(made, **defaults)
        return made

    read = dict(tokens="128 512 2048", batches="1")
    prefill = command("prefill", "time to read a prompt", plugins="ffn:2 ffn:4 ffn,kv:2 ffn,kv:4", **read)
    reading.add_prefill_flags(prefill)
    decode = command(
        "decode", "time of a token after a prompt", plugins="kv:2 kv:4", tokens="4096", batches="1"
    )
    reading.add_decode_flags(decode)
    compiled = command(
        "compile", "torch.compile beside the eager model", plugins="ffn,kv:2", tokens="128 512"
    )
    compiling.add_compile_flags(compiled)
    command("swap", "loading, choosing, and plugins that are off", plugins="ffn,kv:2", tokens="1 512")
    command("train", "a training step beside its parts", plugins="ffn:2", tokens="512", batches="1")
    command("memory", "what training a plugin holds", plugins="ffn:2", tokens="1024", batches="1")
    command("compare", "the plugin's arithmetic, fused and plain", plugins="ffn:2 ffn:4 ffn:8", tokens="2048")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run one benchmark, print its table and store what is asked for."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = cli.parse(build_parser(), argv)
    figures: dict[str, Any] = {}
    if args.command == "memory":
        training.check_memory_flags(args)
        rows, numbers = training.memory_rows(args)
        figures = {"model": args.model, **numbers}
        title = f"{args.model}: training memory"
    else:
        setting = Setting(args)
        rows = _ROWS[args.command](setting)
        figures = setting.facts()
        title = f"{args.model}, {figures['layers']} layers, {figures['dtype']}, {figures['device']}: {args.command}"
    command = ["llm_variator.bench", *argv]
    publish(args, title, rows, figures, command=command, started=started, note=_NOTES[args.command])


if __name__ == "__main__":
    cli.run(main)
