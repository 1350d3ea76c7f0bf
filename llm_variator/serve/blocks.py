"""What requests hold of vLLM's block pool: blocks and requests at the peak, whatever the number of block tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_variator.integrations.vllm.settings import Settings
from llm_variator.sources.models import load_config, plugin_folder


@dataclass
class Peak:
    """The most at any one time."""

    blocks: int = 0
    requests: int = 0
    """That hold blocks."""


@contextlib.contextmanager
def in_use(cache: Any) -> Iterator[Peak]:
    """What requests hold in vLLM's `KVCacheManager` while the context lasts, beyond what is held already."""
    pool, managers, peak = cache.block_pool, cache.coordinator.single_type_managers, Peak()
    free, allocate = pool.get_num_free_blocks(), cache.allocate_slots

    def counting(*args: Any, **kwargs: Any) -> Any:
        found = allocate(*args, **kwargs)
        peak.blocks = max(peak.blocks, free - pool.get_num_free_blocks())
        peak.requests = max(peak.requests, sum(map(bool, managers[0].req_to_blocks.values())))
        return found

    cache.allocate_slots = counting
    try:
        yield peak
    finally:
        cache.allocate_slots = allocate


def block_bytes(cache: Any) -> int:
    """Bytes of a block: those of all layers, or heads, of the longest block table."""
    groups = cache.kv_cache_config.kv_cache_groups
    return max(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups)


def table_count(model: str, plugins: Mapping[str, str]) -> int:
    """Block tables of a request where these plugins are served."""
    config = load_config(model)
    folders = {name: str(plugin_folder(plugin)) for name, plugin in plugins.items()}
    return Settings.of({"plugins": folders}, config).tables(config)[0].number
