"""The compressed KV cache: fewer entries than tokens, on transformers' cache classes. Knows tensors, no model."""

from llm_variator.engine.cache.layer import CompressedLayer
from llm_variator.engine.cache.lifecycle import (
    adopt,
    expand,
    fork,
    is_compressed,
    release,
    released_on_error,
    stack,
)
from llm_variator.engine.cache.paging import KVPool, PoolExhaustedError
from llm_variator.engine.cache.report import KVCacheReport, LayerReport

__all__ = [
    "CompressedLayer",
    "KVCacheReport",
    "KVPool",
    "LayerReport",
    "PoolExhaustedError",
    "adopt",
    "expand",
    "fork",
    "is_compressed",
    "release",
    "released_on_error",
    "stack",
]
