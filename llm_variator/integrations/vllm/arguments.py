"""vLLM's engine arguments for compressed prompts: for `LLM(**...)`, or as command-line flags."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm import FAMILIES
from llm_variator.integrations.vllm.rows import Choice, tracker_path
from llm_variator.integrations.vllm.settings import KEY, WORKER, Settings
from llm_variator.sources.models import load_config, model_source, plugin_folder

SCHEDULER = "llm_variator.integrations.vllm.scheduler.make_scheduler"


def engine_arguments(
    model: str | os.PathLike[str],
    plugins: Mapping[str, str | os.PathLike[str]],
    *,
    default: Choice = 0,
    policy: Mapping[str, Any] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Arguments with which vLLM serves `model` with `plugins`.

    Args:
        model: alias, local folder or hub id.
        plugins: by the name of their ratio ("k2"): a folder, hub id or shipped name.
        default: the choice of requests that do not say: 0, a served ratio, or "auto".
        policy: arguments of `LoadPolicy`, or of another `module:Class` under "class".
        **others: vLLM's own, passed on.

    Raises:
        VariatorError: something does not fit.
    """
    config = load_config(model)
    architecture = (getattr(config, "architectures", None) or [_causal(config.model_type)])[0]
    known = {f"{family}ForCausalLM": f"Variator{family}ForCausalLM" for family in FAMILIES}
    if architecture not in known:
        raise VariatorError(f"{architecture} is not served in vLLM; served are {', '.join(known)}")
    folders = {name: str(plugin_folder(plugin).resolve()) for name, plugin in plugins.items()}
    values: dict[str, Any] = {"plugins": folders, "default": default, "policy": dict(policy or {})}
    settings = Settings.of(values, config)
    arguments: dict[str, Any] = {
        "model": str(model_source(model)),
        "hf_overrides": {"architectures": [known[architecture]]},
        "additional_config": {KEY: values},
        "scheduler_cls": SCHEDULER,
        "logits_processors": [tracker_path(settings.default, settings.served)],
    }
    if settings.selects:
        arguments["worker_cls"] = WORKER
    if settings.compresses_kv:
        if others.get("enable_prefix_caching"):
            raise VariatorError(
                "prefix caching does not work with a plugin that compresses the KV cache: leave out one of them"
            )
        arguments["enable_prefix_caching"] = False
    if clash := sorted((arguments.keys() - {"enable_prefix_caching"}) & others.keys()):
        raise VariatorError(f"llm_variator sets {', '.join(clash)} itself: leave it out")
    return arguments | others


def as_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as the flags of vLLM's server."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            flags += [f"--{flag}", json.dumps(value)]
        elif isinstance(value, (list, tuple)):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def _causal(model_type: str) -> str:
    return f"{model_type.capitalize()}ForCausalLM"
