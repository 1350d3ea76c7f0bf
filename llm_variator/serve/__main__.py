"""`python -m llm_variator.serve`: vLLM's OpenAI server with compression plugins, the ratio chosen per request.

Starts vLLM's own server with the right arguments; its flags follow after `--`. A request chooses by
`"vllm_xargs": {"variator_k": 2}`; the answer's `kv_transfer_params` and the counters `variator_*` under /metrics
tell what was used.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_variator import cli
from llm_variator.cli import REQUIRED, flag
from llm_variator.cli.values import JsonMapping, Port, PositiveFloat
from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm import SERVER
from llm_variator.integrations.vllm.arguments import as_flags, engine_arguments
from llm_variator.serve.flags import Choice, parse_plugins, split
from llm_variator.serve.scratch import scratch_folder
from llm_variator.sources.models import shipped_plugins


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Serve a model with compression plugins through vLLM's OpenAI-compatible server.

    Flags of vLLM's own server follow after a bare --, for instance: -- --max-model-len 8192
    """

    model: str = flag(REQUIRED, "alias, local folder or hub id")
    plugin: tuple[str, ...] = flag(
        (),
        "plugins by ratio, those that keep keys also by a name: k2=FOLDER kv4=HUB_ID; shipped are "
        + ", ".join(shipped_plugins()),
        metavar="kN=PLUGIN",
    )
    default_k: Choice = flag(
        0, 'ratio of requests that do not say: 0 (dense), a served ratio, or "auto" (by load)'
    )
    target_seconds: PositiveFloat | None = flag(None, "time to first token that auto aims at; default 1")
    policy: JsonMapping | None = flag(
        None,
        'JSON object: further arguments of LoadPolicy, or of your own policy under {"class": "module:Class"}',
    )
    dtype: str | None = flag(None, "dtype of the model, as vLLM calls it")
    host: str | None = flag(None, "address to listen on")
    port: Port | None = flag(None, "port to listen on; vLLM's default is 8000")
    dry_run: bool = flag(False, "print the command that would serve, and leave")


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives."""
    try:
        return cli.read(Settings, split(argv)[0], prog="python -m llm_variator.serve")
    except VariatorError as error:
        if "unrecognized arguments" not in str(error):
            raise
        raise VariatorError(f"{error}; flags of vLLM's own server follow after a bare --") from None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input. Returns when the server ends."""
    settings, others = read(argv), split(argv)[1]
    plugins = parse_plugins(settings.plugin)
    policy: dict[str, Any] = dict(settings.policy or {})
    if settings.target_seconds is not None:
        policy["target_seconds"] = settings.target_seconds
    given: dict[str, Any] = {name: getattr(settings, name) for name in ("host", "port", "dtype")}
    given = {name: value for name, value in given.items() if value is not None}
    arguments = engine_arguments(settings.model, plugins, default=settings.default_k, policy=policy)
    if clash := [word for word in others if word.split("=")[0].lstrip("-").replace("-", "_") in arguments]:
        raise VariatorError(f"{', '.join(clash)} is set by this command: leave it out after --")
    flags = as_flags(arguments | {"served_model_name": [settings.model]} | given) + others
    if settings.dry_run:
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


if __name__ == "__main__":
    cli.run(main)
