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

from llm_variator.integrations.vllm.heads import Keep


class CompressedPromptManager(FullAttentionManager):
    """Gives each request the blocks of its entries instead of its tokens.

    Where keys are kept, entries may become fewer when a prompt's blocks are reduced. Blocks are then not given back but
    filled by the tokens that follow: vLLM's runners can only add to a block table, and a step in flight may still read.
    """

    entries_of: Callable[[str, int, CompressedPromptSpec], int] | None = None
    """(request id, tokens, the layers' specification) -> entries; set by the scheduler."""

    def _entries(self, request_id: str, tokens: int) -> int:
        if self.entries_of is None:
            return tokens
        return self.entries_of(request_id, tokens, self.kv_cache_spec)

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


@register_kv_cache_spec(manager_class=CompressedPromptManager)
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressedPromptSpec(FullAttentionSpec):
    """Full attention whose prompt entries may stand for several tokens.

    Layers of the same `kind` share a block table, as vLLM's hybrid models have one for each kind of layer.
    """

    ratios: tuple[tuple[int, int], ...] = ()
    """(ratio a plugin is served under, tokens of an entry in these layers), where it compresses them."""
    keeps: tuple[tuple[int, Keep], ...] = ()
    """(ratio a plugin is served under, how it reduces a prompt), where this is one KV head and it keeps keys."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers hold equally many entries where this is the same."""
        return self.ratios, self.keeps

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Of equal layers only; vLLM takes the AssertionError for "not uniform"."""
        assert len({spec.kind for spec in specs}) == 1, "these layers hold different numbers of entries"
        return dataclasses.replace(super().merge(specs), ratios=specs[0].ratios, keeps=specs[0].keeps)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all of them need the same number of slots."""
        same = all(spec.kind == self.kind for spec in kv_cache_specs.values())
        return same and super().is_uniform_with_collection(kv_cache_specs)
