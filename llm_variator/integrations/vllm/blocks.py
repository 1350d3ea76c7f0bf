"""Compressed prompt KV in vLLM's real blocks: fewer entries, fewer blocks, more requests in the same pool.

The scheduler's side of `attkv`: a cache specification whose manager counts entries instead of tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec


class CompressedPromptManager(FullAttentionManager):
    """Gives each request the blocks of its entries instead of its tokens."""

    entries_of: Callable[[str, int], int] | None = None
    """(request id, tokens) -> entries; set by the scheduler."""

    def _entries(self, request_id: str, tokens: int) -> int:
        return tokens if self.entries_of is None else self.entries_of(request_id, tokens)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Blocks that `num_tokens` tokens still need."""
        return super().get_num_blocks_to_allocate(
            request_id, self._entries(request_id, num_tokens), *args, **kwargs
        )

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> Any:
        """Allocate them."""
        main = self._entries(request_id, num_tokens_main_model)
        return super().allocate_new_blocks(request_id, self._entries(request_id, num_tokens), main)

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Prefix caching is off: a block holds no fixed range of tokens."""


class _Apart(FullAttentionSpec):
    """Layers that hold entries and layers that hold tokens need block tables of their own: vLLM may not join them."""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Of one kind only; vLLM takes the AssertionError for "not uniform"."""
        assert all(type(spec) is cls for spec in specs), "compressed and dense KV caches differ"
        return super().merge(specs)


@register_kv_cache_spec(manager_class=CompressedPromptManager)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedPromptSpec(_Apart):
    """Full attention whose prompt entries may stand for several tokens."""


@register_kv_cache_spec(manager_class=FullAttentionManager)
@dataclasses.dataclass(frozen=True, kw_only=True)
class WholePromptSpec(_Apart):
    """Full attention over tokens, in a model where other layers hold entries."""
