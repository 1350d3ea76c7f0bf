"""Compressed prompt KV in vLLM's real blocks: fewer entries, fewer blocks, more requests in the same pool.

The scheduler's side of `attkv`: a cache specification whose manager counts entries instead of tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.heads import Keep

SHORTENED = "variator_shortened"
"""Where a step of the scheduler says how many blocks requests are left, by request id and KV cache group."""


class Ledger(Protocol):
    """What the scheduler knows of requests."""

    def entries(self, request_id: str, tokens: int, spec: CompressedPromptSpec) -> int:
        """Entries of a request's first `tokens` tokens in layers of this specification."""

    def scheduled(self, request_id: str) -> int:
        """Tokens that are computed, or are being computed."""

    def shortened(self, request_id: str, group: int, blocks: int) -> None:
        """A request is left so many blocks in a KV cache group."""


class CompressedPromptManager(FullAttentionManager):
    """Gives each request the blocks of its entries instead of its tokens.

    Where keys are kept, a prompt that is being read may need more entries than what is left of it. Then blocks are
    given back.
    """

    ledger: Ledger | None = None
    """Set by the scheduler."""

    def _entries(self, request_id: str, tokens: int) -> int:
        if self.ledger is None:
            return tokens
        return self.ledger.entries(request_id, tokens, self.kv_cache_spec)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give back what only the reading of the prompt needed, once no step that reads it is under way."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks or self.ledger is None or not self.kv_cache_spec.keeps:
            return
        if num_prompt_tokens is None or processed_computed_tokens < num_prompt_tokens:
            return
        left = cdiv(self._entries(request_id, self.ledger.scheduled(request_id)), self.block_size)
        if len(blocks) > left:
            self.block_pool.free_blocks(reversed(blocks[left:]))
            del blocks[left:]
            self.ledger.shortened(request_id, self.kv_cache_group_id, left)

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

    ratios: tuple[tuple[Ratio, int], ...] = ()
    """(what a plugin is served under, tokens of an entry in these layers), where it compresses them."""
    keeps: tuple[tuple[Ratio, Keep], ...] = ()
    """(what a plugin is served under, how it reduces a prompt), where this is one KV head and it keeps keys."""

    parted: bool = False
    """Whether this head belongs to a part of its class that is one of its own (`tables`)."""

    @property
    def kind(self) -> tuple[Any, ...]:
        """Layers hold equally many entries where this is the same."""
        return self.ratios, self.keeps, self.parted

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Of equal layers only; vLLM takes the AssertionError for "not uniform"."""
        assert len({spec.kind for spec in specs}) == 1, "these layers hold different numbers of entries"
        own = dict(zip(("ratios", "keeps", "parted"), specs[0].kind, strict=True))
        return dataclasses.replace(super().merge(specs), **own)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all of them need the same number of slots."""
        same = all(spec.kind == self.kind for spec in kv_cache_specs.values())
        return same and super().is_uniform_with_collection(kv_cache_specs)
