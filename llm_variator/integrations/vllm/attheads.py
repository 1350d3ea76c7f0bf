"""Attention where plugins keep keys and values, each KV head its own choice: one cache per head in vLLM's blocks.

To vLLM every KV head is an attention layer with one KV head, so heads that are reduced alike share a block table and
real blocks, while the model's own attention layer has no cache of its own. What the head holds is read by vLLM's
kernels with our slots and lengths; a chunk of a prompt that is being reduced is read by the attention of the Hugging
Face path, from the entries in the blocks and the step's own keys, and only what is left of it goes into the blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer
from vllm import _custom_ops as ops
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata, _get_attn_isa
from vllm.v1.kv_cache_interface import FullAttentionSpec

from llm_variator.engine.blocks import Kept, Region
from llm_variator.engine.cache.selected import Entries, HeadClass
from llm_variator.engine.hooks.strips import View, attend_region
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.attkv import (
    CompressedAttention,
    CompressedImpl,
    CompressedMetadataBuilder,
    Run,
    check_attention,
    metadata_of,
)
from llm_variator.integrations.vllm.blocks import CompressedPromptSpec
from llm_variator.integrations.vllm.heads import HeadStep, Reading
from llm_variator.integrations.vllm.plan import Layout
from llm_variator.integrations.vllm.tables import kind_of

# --- one step's metadata


@dataclasses.dataclass
class HeadMetadata(CPUAttentionMetadata):
    """What all heads of one kind compute and write in a step."""

    layout: Layout | None = None
    step: HeadStep | None = None
    written: Tensor | None = None
    """(written,) which entries of the layer go to `slots`."""
    slots: Tensor | None = None
    grouped: dict[Ratio, Run] = dataclasses.field(default_factory=dict)
    dense: Run | None = None
    dense_rows: Tensor | None = None
    """(queries of `dense`,) their rows in the flattened batch."""
    memories: dict[int, dict[int, Any]] = dataclasses.field(default_factory=dict)
    """By row of the batch that reads: `Request.memory`."""
    positions: Tensor | None = None
    """(entries,) position of every entry; the first layer fills it in."""


class HeadMetadataBuilder(CompressedMetadataBuilder):
    """Plans a step for all heads of one kind."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> HeadMetadata:
        """Ours alone: nobody runs the stock kernel over tokens."""
        common = common_attn_metadata
        if self.table.prepared is not None:
            raise RuntimeError("llm_variator: plugins that keep keys and values need vLLM's V1 model runner")
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        rows = [row for row in range(len(starts) - 1) if starts[row + 1] > starts[row]]
        blocks = common.block_table_tensor
        step = HeadStep(
            self.table.chunks(starts, lengths),
            rows,
            self.ratios,
            dict(self.kv_cache_spec.keeps),
            self.shapes,
            blocks.numpy(),
            self.block_size,
        )
        return HeadMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=blocks,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            layout=step.layout,
            step=step,
            written=torch.from_numpy(step.written),
            slots=torch.from_numpy(step.slots),
            grouped={
                plugin: self._run(part, blocks, self.num_heads * step.layout.ratios[plugin])
                for plugin, part in step.grouped.items()
            },
            dense=self._run(step.dense, blocks, self.num_heads) if step.dense.rows else None,
            dense_rows=torch.from_numpy(step.dense_index),
            memories={row: self.table.requests[row].memory for row in step.reading},
        )


class HeadBackend(CPUAttentionBackend):
    """vLLM's CPU backend for one KV head."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_builder_cls() -> type[HeadMetadataBuilder]:
        """Metadata."""
        return HeadMetadataBuilder


# --- one head's cache


class HeadCache(AttentionLayerBase):
    """One KV head of one layer, a layer of its own to vLLM."""

    _k_scale_float = _v_scale_float = 1.0

    def __init__(self, name: str, attention: Attention, spec: CompressedPromptSpec) -> None:
        self.name = name
        self.spec: Any = spec
        self.num_heads = attention.num_heads // attention.num_kv_heads
        self.impl: Any = SimpleNamespace(num_heads=self.num_heads)
        self.kv_cache_dtype = attention.kv_cache_dtype
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[HeadBackend]:
        """Whose builder plans a step."""
        return HeadBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> CompressedPromptSpec:
        """One head's."""
        return dataclasses.replace(self.spec, block_size=vllm_config.cache_config.block_size)

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the blocks (blocks, 1, size, 2 d)."""
        blocks, _, size, width = kv_cache.shape
        self.kv_cache, self.size = kv_cache, size
        self.pair = kv_cache.view(blocks, 1, size * 2, -1).chunk(2, dim=2)
        self.isa = _get_attn_isa(kv_cache.dtype, size, width // 2, self.kv_cache_dtype)
        self.orders = _orders(kv_cache.dtype, size, width // 2, self.isa, self.kv_cache_dtype)

    def write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """(n, d) to (n,) slots."""
        if not len(slots):
            return
        ops.cpu_attn_reshape_and_cache(
            key[:, None].contiguous(),
            value[:, None].contiguous(),
            *self.pair,
            slots,
            self.isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=self.kv_cache_dtype,
        )

    def read(self, blocks: Tensor, entries: int) -> tuple[Tensor, Tensor]:
        """Keys and values (entries, d) that lie one behind the other in `blocks`."""
        found = []
        for half, order in zip(self.pair, self.orders, strict=True):
            raw = half[blocks].flatten(1)
            raw = raw if order is None else raw[:, order]
            found.append(raw.view(-1, half.shape[-1])[:entries])
        return found[0], found[1]


@functools.lru_cache(maxsize=8)
def _orders(dtype: torch.dtype, size: int, dim: int, isa: str, kv_cache_dtype: str) -> tuple[Any, Any]:
    """For keys and for values: where each number of a block (tokens, d) lies in it; None: in its own place.

    The kernels of each processor lay out a block as suits them, which vLLM does not tell: so it is tried out.
    """
    seen = []
    for numbers in (torch.arange(size)[:, None], torch.arange(dim)[None]):  # each exact in any dtype
        part = numbers.to(dtype).expand(size, dim)[:, None].contiguous()
        cache = torch.zeros(1, 1, size * 2, dim, dtype=dtype)
        pair = cache.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            part,
            part,
            *pair,
            torch.arange(size),
            isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=kv_cache_dtype,
        )
        seen.append([half.flatten().long() for half in pair])
    orders = []
    for token, place in zip(*seen, strict=True):
        flat = token * dim + place
        order = flat.argsort()
        if not torch.equal(flat[order], torch.arange(size * dim)):
            raise RuntimeError(
                f"llm_variator: the CPU kernel {isa} does not store keys and values as they are"
            )
        orders.append(None if torch.equal(order, order.sort().values) else order)
    return orders[0], orders[1]


# --- attention


class HeadwiseAttention(Attention):
    """A model's attention layer whose heads have a cache each."""

    variator_heads: list[HeadCache]
    variator_scores: Mapping[Ratio, Callable[[Tensor], Tensor]]
    """Plugin -> the scores of keys in this layer, (b, n, d) -> (b, KV heads, n)."""
    variator_layer: int
    variator_input: Tensor | None = None
    """(rows, d) what the running attention reads."""

    def get_kv_cache_spec(self, vllm_config: Any) -> None:
        """None: the heads have theirs."""
        return

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(rows, H d), and (entries, H_kv d) twice -> (rows, H d)."""
        found = [metadata_of(head.name) for head in self.variator_heads]
        if found[0] is None:  # a dummy batch
            return torch.zeros_like(query)
        queries = query.view(len(query), self.num_kv_heads, -1, self.head_size)
        keys, values = (part.view(len(part), self.num_kv_heads, -1) for part in (key, value))
        out = torch.zeros_like(queries)
        for row in dict.fromkeys(row for metadata in found for row in metadata.step.reading):
            own = {h: metadata for h, metadata in enumerate(found) if row in metadata.step.reading}
            readings = {h: metadata.step.reading[row] for h, metadata in own.items()}
            self._read(readings, next(iter(own.values())).memories[row], queries, keys, values, out)
        for head, (cache, metadata) in enumerate(zip(self.variator_heads, found, strict=True)):
            if metadata.layout.groups and len(key) != metadata.layout.entries:
                raise RuntimeError(
                    f"llm_variator: {len(key)} keys for {metadata.layout.entries} entries, the KV cache was not "
                    "compressed as planned"
                )
            cache.write(keys[metadata.written, head], values[metadata.written, head], metadata.slots)
            self._attend_head(cache, metadata, queries[:, head], out[:, head])
        return out.view(query.shape)

    def _attend_head(self, cache: HeadCache, metadata: HeadMetadata, query: Tensor, out: Tensor) -> None:
        """Fill in `out` (rows, g, d) where the kernel reads what one head holds."""
        layout, attend = metadata.layout, functools.partial(self.impl._attend, cache)
        assert layout is not None
        for plugin, run in metadata.grouped.items():
            packed = layout.members(query, plugin).contiguous()  # (groups, k, g, d)
            found = torch.empty_like(packed)
            attend(packed.flatten(1, 2), found.flatten(1, 2), cache.pair, run)
            layout.put(out, found, plugin)
        if metadata.dense is not None:
            alone = query[metadata.dense_rows].contiguous()
            found = torch.empty_like(alone)
            attend(alone, found, cache.pair, metadata.dense)
            out[metadata.dense_rows] = found

    def _read(
        self,
        readings: Mapping[int, Reading],
        memory: dict[int, Any],
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        out: Tensor,
    ) -> None:
        """Attention of one request's chunk of its prompt in the heads that reduce it, and what they keep of it.

        Args:
            readings: by head.
            memory: `Request.memory`.
            queries: (rows, H_kv, g, d), like `out`.
            keys: (entries, H_kv, d), like `values`.
            values: of the step.
            out: to fill in.
        """
        heads, first = list(readings), next(iter(readings.values()))
        rows = slice(first.start, first.start + first.tokens)
        region = Region([first.place], [first.tokens], first.keep.block, keys.device)
        scores = self._scores(first, memory, region)[:, heads]  # (1, heads, T)
        order = region.order(scores)
        held = {
            head: self.variator_heads[head].read(torch.from_numpy(one.blocks).long(), one.held)
            for head, one in readings.items()
        }
        entries = slice(first.entry, first.entry + first.tokens)
        pair = [
            torch.stack(
                [torch.cat((held[h][side][one.before :], new[entries, h])) for h, one in readings.items()]
            )[None]
            for side, new in enumerate((keys, values))
        ]  # (1, heads, T, d) twice
        views = []
        for k in sorted({one.keep.k for one in readings.values()}):
            places = [place for place, head in enumerate(heads) if readings[head].keep.k == k]
            before, far = readings[heads[places[0]]].before, None
            if before:
                own = [torch.stack([held[heads[p]][side][:before] for p in places])[None] for side in (0, 1)]
                far = Entries(own[0], own[1], None)
            one = HeadClass(tuple(places), DynamicLayer(), torch.empty(1, len(places), 0), k)
            views.append(View(one, one.of(order), far))
        query = queries[rows][:, heads].permute(1, 2, 0, 3)[None]  # (1, heads, g, n, d)
        seen = attend_region(query, pair[0], pair[1], views, region, self.impl.scale)
        for place, head in enumerate(heads):
            out[rows, head] = seen[0, place].transpose(0, 1)
        for view in views:
            one = view.heads
            kept = Kept.of(region.keep(one.of(scores), view.order, one.k), region.counts(one.k))
            left = [kept.take(one.of(part))[0] for part in pair]  # (class, m, d)
            for number, place in enumerate(one.heads):
                slots = torch.from_numpy(readings[heads[place]].slots)
                if left[0].shape[1] != len(slots):
                    raise RuntimeError(
                        f"llm_variator: {left[0].shape[1]} keys are left for {len(slots)} entries"
                    )
                self.variator_heads[heads[place]].write(left[0][number], left[1][number], slots)

    def _scores(self, reading: Reading, memory: dict[int, Any], region: Region) -> Tensor:
        """(1, H_kv, T) of pending tokens and new ones; what the next chunk needs of them is remembered."""
        assert self.variator_input is not None
        x = self.variator_input[None, reading.start : reading.start + reading.tokens]
        scores = self.variator_scores[reading.plugin](x)
        before = memory.pop(self.variator_layer, None)
        if reading.pending:
            done = before.places[0].done if before is not None else 0
            if done != reading.place.done:
                raise RuntimeError(
                    f"llm_variator: a chunk begins at token {reading.place.done} of its prompt, and what is "
                    f"remembered ends at {done}"
                )
            scores = torch.cat((before.scores, scores), dim=-1)
        if (after := region.after(scores)) is not None:
            memory[self.variator_layer] = after
        return scores


class HeadImpl(CompressedImpl):
    """The kernel's call; a layer's own forward of it is never used."""


class SelectingAttention(CompressedAttention):
    """Comes before a self-attention's own class: its cache sees what it reads, to score it."""

    def run(self, positions: Tensor, x: Tensor) -> Tensor:
        """What the op does."""
        inner: Any = self.attn
        inner.variator_input = x
        try:
            return super().run(positions, x)
        finally:
            inner.variator_input = None


def attach_heads(
    attention: Any,
    plugins: Mapping[Ratio, CompressionPlugin],
    layer: int,
    name: str,
    context: dict[str, Any],
    parted: Collection[tuple[int, int]] = (),
) -> SelectingAttention:
    """Subclass one self-attention in place, and give each of its KV heads a cache, in vLLM's forward `context`.

    `parted`: the (layer, head) that are made a class of their own (`tables.cut_heads`).

    Raises:
        VariatorError: the platform's attention, or this model's, is not one that can hold entries.
    """
    inner = attention.attn
    check_attention(attention)
    stock = inner.get_kv_cache_spec(get_current_vllm_config())
    assert type(stock) is FullAttentionSpec
    fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
    plans = {k: plugin.plan for k, plugin in plugins.items()}
    selects = {k: plugin.selects[layer] for k, plugin in plugins.items() if layer in plugin.selects}
    inner.__class__, inner.impl.__class__ = HeadwiseAttention, HeadImpl
    inner.variator_heads, inner.variator_layer = [], layer
    inner.variator_scores = {k: site.score for k, site in selects.items()}
    for head in range(inner.num_kv_heads):
        kind = kind_of(plans, layer, head)._asdict()
        spec = CompressedPromptSpec(**fields | {"num_kv_heads": 1}, **kind, parted=(layer, head) in parted)
        cache = HeadCache(f"{inner.layer_name}.head_{head}", inner, spec)
        inner.variator_heads.append(cache)
        context[cache.name] = cache
    attention.__class__ = type(
        f"Selecting{type(attention).__name__}", (SelectingAttention, type(attention)), {}
    )
    attention.variator_name, attention.variator_layer = name, layer
    attention.variator_plugins, attention.variator_cache = plugins, inner.variator_heads[0].name
    return attention
