"""`python -m llm_variator.serve`: vLLM's OpenAI server with compression plugins, the ratio chosen per request.

Starts vLLM's own server with the right arguments; its flags follow after `--`. A request chooses by
`"vllm_xargs": {"variator_k": 2}`; the answer's `kv_transfer_params` and the counters `variator_*` under /metrics
tell what was used.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm import SERVER
from llm_variator.integrations.vllm.arguments import as_flags, engine_arguments
from llm_variator.integrations.vllm.rows import AUTO
from llm_variator.old_cli import Parser, json_mapping, parse, positive_float, positive_int, run
from llm_variator.serve.scratch import scratch_folder
from llm_variator.sources.models import shipped_plugins


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input. Returns when the server ends."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    own, others = words[:split], words[split + 1 :]
    args = parse(build_parser(), own)
    plugins = parse_plugins(args.plugin)
    policy: dict[str, Any] = dict(args.policy or {})
    if args.target_seconds is not None:
        policy["target_seconds"] = args.target_seconds
    given: dict[str, Any] = {name: getattr(args, name) for name in ("host", "port", "dtype")}
    given = {name: value for name, value in given.items() if value is not None}
    arguments = engine_arguments(args.model, plugins, default=args.default_k, policy=policy)
    if clash := [flag for flag in others if flag.split("=")[0].lstrip("-").replace("-", "_") in arguments]:
        raise VariatorError(f"{', '.join(clash)} is set by this command: leave it out after --")
    flags = as_flags(arguments | {"served_model_name": [args.model]} | given) + others
    if args.dry_run:
        print("python -m vllm.entrypoints.openai.api_server", shlex.join(flags))
        return
    if importlib.util.find_spec("vllm") is None:
        raise VariatorError("serving needs vLLM: pip install 'llm-variator[vllm]'")
    with scratch_folder() as folder:
        # before prometheus_client is imported anywhere: the scheduler counts in another process
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)  # vLLM's sockets
        os.environ[SERVER] = str(os.getpid())
        _serve(flags)


def _serve(flags: list[str]) -> None:
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    sys.argv = ["llm_variator.serve", *flags]
    serve()


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command line."""
    parser = Parser(
        prog="python -m llm_variator.serve",
        description="Serve a model with compression plugins through vLLM's OpenAI-compatible server.",
        epilog="Flags of vLLM's own server follow after a bare --, for instance: -- --max-model-len 8192",
    )
    parser.add_argument("--model", required=True, help="alias, local folder or hub id")
    parser.add_argument(
        "--plugin",
        nargs="+",
        default=[],
        metavar="kN=PLUGIN",
        help="plugins by ratio: k2=FOLDER k4=HUB_ID; shipped are " + ", ".join(shipped_plugins()),
    )
    parser.add_argument(
        "--default-k",
        type=choice,
        default=0,
        help='ratio of requests that do not say: 0 (dense), a served ratio, or "auto" (by load)',
    )
    parser.add_argument(
        "--target-seconds", type=positive_float, help="time to first token that auto aims at; default 1"
    )
    parser.add_argument(
        "--policy",
        type=json_mapping,
        help="JSON object: further arguments of LoadPolicy, or of your own policy under "
        '{"class": "module:Class"}',
    )
    parser.add_argument("--dtype", help="dtype of the model, as vLLM calls it")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=positive_int, help="port to listen on; vLLM's default is 8000")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command that would serve, and leave"
    )
    return parser


def choice(text: str) -> int | str:
    """0, a ratio, or "auto"."""
    if text == AUTO:
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'expected 0, a ratio or "auto", got {text!r}')
    return int(text)


def parse_plugins(given: Sequence[str]) -> dict[str, str]:
    """`["k2=folder"]` -> {"k2": "folder"}."""
    plugins: dict[str, str] = {}
    for item in given:
        name, equals, plugin = item.partition("=")
        if not (name and equals and plugin):
            raise VariatorError(f"--plugin takes kN=PLUGIN, for instance k2=smollm2-135m/k2; got {item!r}")
        if name in plugins:
            raise VariatorError(f"--plugin names {name} twice: one plugin per ratio")
        plugins[name] = plugin
    return plugins


if __name__ == "__main__":
    run(main)
