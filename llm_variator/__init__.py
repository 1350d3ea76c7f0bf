"""Plug-and-play compression plugins that make frozen language models cheaper on long inputs."""

from llm_variator.config import VariatorConfig
from llm_variator.engine.cache import KVPool, PoolExhaustedError
from llm_variator.engine.contexts import CompressedContext
from llm_variator.errors import VariatorError
from llm_variator.model import VariatorModel

__version__ = "0.1.0"
__all__ = [
    "CompressedContext",
    "KVPool",
    "PoolExhaustedError",
    "VariatorConfig",
    "VariatorError",
    "VariatorModel",
    "__version__",
]
