"""Configurations of models, without their weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from llm_variator.errors import VariatorError
from llm_variator.extras import needed
from llm_variator.sources.models.aliases import ALIASES
from llm_variator.sources.models.names import (
    LOAD_ERRORS,
    base_name,
    checked_name,
    load_error,
    local_only,
    local_path,
    reason,
    source_of,
)

ADAPTER_FILE = "adapter_config.json"  # PEFT's name; a folder that has one holds a LoRA


def load_config(name: str | os.PathLike[str], *, num_layers: int | None = None) -> PreTrainedConfig:
    """The configuration behind a name, without its weights; aliases need neither network nor files.

    Raises:
        VariatorError: unknown name, unreadable config.json, or `num_layers` below 1.
    """
    name = checked_name(name)
    if name in ALIASES:
        config = AutoConfig.for_model(**ALIASES[name].config)
    elif holds_adapter(name):
        config = load_config(adapted_base(name))
    else:
        source = source_of(name)
        config = read_config(name, source, local_only(source))
    if num_layers is not None:
        config = _with_layers(config, num_layers)
    config._name_or_path = base_name(name)
    return config


def read_config(name: str, source: Path | str, only_local: bool) -> PreTrainedConfig:
    """The configuration in a folder or on the hub; raises for one that cannot be read."""
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False, local_files_only=only_local)
    except LOAD_ERRORS as error:
        raise load_error(name, source, "configuration", error, only_local) from error


def holds_adapter(name: str) -> bool:
    """Whether the name is a folder with a LoRA."""
    return name not in ALIASES and (local_path(name) / ADAPTER_FILE).is_file()


def peft() -> Any:
    """PEFT; raises where it is not installed."""
    return needed("peft", "a LoRA", "train")


def adapted_base(name: str) -> str:
    """The name of the model that a LoRA folder was trained on."""
    library = peft()
    try:
        base = library.PeftConfig.from_pretrained(name).base_model_name_or_path
    except LOAD_ERRORS as error:
        raise VariatorError(f"cannot read the LoRA in {name}: {reason(error)}") from error
    if not base:
        raise VariatorError(f"{name}/{ADAPTER_FILE} does not name its base model; save the LoRA again")
    return str(base)


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same configuration with another depth; per-layer lists go back to the architecture's pattern."""
    if num_layers < 1:
        raise VariatorError(f"num_layers must be at least 1, not {num_layers}")
    values = config.to_dict()
    values.pop("layer_types", None)
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[depth_key] = num_layers
    if "num_decoder_layers" in values:
        values["num_decoder_layers"] = num_layers
    try:
        return type(config).from_dict(values)
    except LOAD_ERRORS as error:
        raise VariatorError(f"no model of {num_layers} layers can be built: {reason(error)}") from error
