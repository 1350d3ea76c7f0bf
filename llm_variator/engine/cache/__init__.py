"""The compressed KV cache: fewer entries than tokens, on transformers' cache classes. Knows tensors, no model."""

from llm_variator.engine.cache.layer import CompressedLayer
from llm_variator.engine.cache.lifecycle import (
    adopt,
    columns_of,
    expand,
    fork,
    is_compressed,
    release,
    released_on_error,
    stack,
)
from llm_variator.engine.cache.paging import KVPool, PoolExhaustedError
from llm_variator.engine.cache.report import ClassReport, KVCacheReport, LayerReport
from llm_variator.engine.cache.selected import SelectedLayer

__all__ = [
    "ClassReport",
    "CompressedLayer",
    "KVCacheReport",
    "KVPool",
    "LayerReport",
    "PoolExhaustedError",
    "SelectedLayer",
    "adopt",
    "columns_of",
    "expand",
    "fork",
    "is_compressed",
    "release",
    "released_on_error",
    "stack",
]
