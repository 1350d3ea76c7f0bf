"""Names to models, tokenizers and plugin folders: aliases, local folders and hub ids.

Remote code is never executed. Nothing here knows about compression but the names of a plugin's files.
"""

from llm_variator.sources.models.configuration import load_config
from llm_variator.sources.models.hub import hub_reachable
from llm_variator.sources.models.model import load_model
from llm_variator.sources.models.names import base_name, local_path, model_source
from llm_variator.sources.models.plugins import plugin_folder, resolve_plugin, shipped_plugins
from llm_variator.sources.models.tokenizer import byte_tokenizer, load_tokenizer

__all__ = [
    "base_name",
    "byte_tokenizer",
    "hub_reachable",
    "load_config",
    "load_model",
    "load_tokenizer",
    "local_path",
    "model_source",
    "plugin_folder",
    "resolve_plugin",
    "shipped_plugins",
]
