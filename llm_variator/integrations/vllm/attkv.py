"""Attention over compressed prompt KV: what each step computes, and where its entries go.

Keys and values are computed once, from the merged states. The k queries of a group see the same entries, so for
the kernel they are k times more heads at one position, and plain causal attention is exact; dense tokens are
ordinary rows over the same blocks. Implemented on vLLM's CPU backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm import _custom_ops as ops
from vllm import envs
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.errors import VariatorError
from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.blocks import CompressedPromptSpec
from llm_variator.integrations.vllm.heads import Rows
from llm_variator.integrations.vllm.plan import Chunk, Layout, Shape, held, parts
from llm_variator.integrations.vllm.rows_v1 import row_table
from llm_variator.integrations.vllm.settings import settings_of

# --- one step's metadata


class Run(NamedTuple):
    """One call of the attention kernel."""

    query_start: Tensor
    """(rows + 1,) int32, in entries' order."""
    lengths: Tensor
    """(rows,) int32: entries each row may see at its last query."""
    block_table: Tensor
    schedule: Tensor


@dataclasses.dataclass
class CompressedMetadata(CPUAttentionMetadata):
    """Adds where entries go and what each kernel call computes."""

    layout: Layout | None = None
    slots: Tensor | None = None
    """(entries,) slot of every entry, in the layout's order."""
    grouped: dict[Ratio, Run] = dataclasses.field(default_factory=dict)
    """By plugin: the queries of its groups."""
    dense: Run | None = None
    positions: Tensor | None = None
    """(entries,) position of every entry; the first layer fills it in."""


class CompressedMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans the kernel calls of a step for all layers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = settings_of(self.vllm_config)
        self.ratios: Mapping[Ratio, int] = dict(self.kv_cache_spec.ratios)
        self.shapes: Mapping[Ratio, Shape] = settings.shapes
        self.table = row_table(self.vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CompressedMetadata:
        """The stock metadata, and ours."""
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        lengths = common_attn_metadata.seq_lens.tolist()
        rows = [row for row in range(len(starts) - 1) if starts[row + 1] > starts[row]]
        chunks = self.table.chunks(starts, lengths)
        blocks = common_attn_metadata.block_table_tensor
        return self._plan(stock, chunks, rows, blocks)

    def _plan(
        self, stock: CPUAttentionMetadata, chunks: list[Chunk], rows: list[int], blocks: Tensor
    ) -> CompressedMetadata:
        layout = Layout(chunks, self.ratios, self.shapes)
        table = blocks.numpy()
        groups = {plugin: Rows() for plugin in layout.groups}
        dense = Rows()
        for row, chunk in zip(rows, chunks, strict=True):
            k, shape = self.ratios.get(chunk.plugin) or 1, self.shapes.get(chunk.plugin, Shape(0, 0, ()))
            before, inside, _ = parts(chunk, k, *shape[:2]) if k > 1 else (chunk.tokens, 0, 0)

            def end(tokens: int, of: Chunk = chunk, k: int = k, shape: Shape = shape) -> int:
                return held(of.position + tokens, of.prompt, k, shape.head, shape.tail)

            dense.add(row, before, end(before), table, self.block_size)
            if inside:
                groups[chunk.plugin].add(row, inside // k, end(before + inside), table, self.block_size)
            dense.add(row, chunk.tokens - before - inside, end(chunk.tokens), table, self.block_size)
        parts_ = [*groups.values(), dense]
        slots = [piece for part in parts_ for piece in part.slots]
        fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
        return CompressedMetadata(
            **fields,
            layout=layout,
            slots=torch.from_numpy(np.concatenate(slots)) if slots else None,
            grouped={
                plugin: self._run(part, blocks, self.num_heads * layout.ratios[plugin])
                for plugin, part in groups.items()
            },
            dense=self._run(dense, blocks, self.num_heads) if dense.rows else None,
        )

    def _run(self, part: Rows, blocks: Tensor, heads: int) -> Run:
        starts = torch.tensor(part.starts, dtype=torch.int32)
        lengths = torch.tensor(part.lengths, dtype=torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(part.rows),
            num_heads=heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return Run(starts, lengths, blocks[part.rows].contiguous(), schedule)


# --- attention


class CompressedImpl(CPUAttentionBackendImpl):
    """Attention of per-token queries over entries."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill in `output` (rows, H, d) from `query` (rows, H, d), `key` and `value` (entries, H_kv, d)."""
        if attn_metadata is None:
            return output
        blocks, kv_heads, size, _ = kv_cache.shape
        cache = kv_cache.view(blocks, kv_heads, size * 2, -1).chunk(2, dim=2)
        layout, slots = attn_metadata.layout, attn_metadata.slots
        if layout.groups and len(key) != len(slots):
            raise RuntimeError(
                f"llm_variator: {len(key)} keys for {len(slots)} entries, the KV cache was not compressed as planned"
            )
        ops.cpu_attn_reshape_and_cache(
            key[: len(slots)],
            value[: len(slots)],
            *cache,
            slots,
            layer.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        if not layout.groups:
            self._attend(layer, query[: layout.rows], output[: layout.rows], cache, attn_metadata.dense)
            return output
        for plugin, run in attn_metadata.grouped.items():
            members = layout.members(query, plugin).unflatten(2, (kv_heads, -1))
            packed = members.transpose(1, 2).contiguous()  # (groups, H_kv, k, H/H_kv, d)
            found = torch.empty_like(packed)
            self._attend(layer, packed.flatten(1, 3), found.flatten(1, 3), cache, run)
            layout.put(output.unflatten(1, (kv_heads, -1)), found.transpose(1, 2), plugin)
        if attn_metadata.dense is not None:
            alone = layout.alone(query).contiguous()
            found = torch.empty_like(alone)
            self._attend(layer, alone, found, cache, attn_metadata.dense)
            layout.put_alone(output, found)
        output[layout.rows :] = 0
        return output

    def _attend(self, layer: Any, query: Tensor, output: Tensor, cache: Any, run: Run) -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=cache[0],
            value_cache=cache[1],
            output=output,
            query_start_loc=run.query_start,
            seq_lens=run.lengths,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=run.block_table,
            softcap=0,
            scheduler_metadata=run.schedule,
            s_aux=None,
            dynamic_causal=None,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class CompressedBackend(CPUAttentionBackend):
    """vLLM's CPU backend over entries; it writes the cache itself."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[CompressedImpl]:
        """Attention."""
        return CompressedImpl

    @staticmethod
    def get_builder_cls() -> type[CompressedMetadataBuilder]:
        """Metadata."""
        return CompressedMetadataBuilder


class EntryAttention(Attention):
    """vLLM's attention layer with our cache specification."""

    variator_ratios: tuple[tuple[Ratio, int], ...]

    def get_kv_cache_spec(self, vllm_config: Any) -> CompressedPromptSpec:
        """The stock specification under our type."""
        stock = super().get_kv_cache_spec(vllm_config)
        assert type(stock) is FullAttentionSpec
        fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
        return CompressedPromptSpec(**fields, ratios=self.variator_ratios)


class CompressedAttention(nn.Module):
    """Comes before a self-attention's own class: keys and values of groups from their merged states."""

    variator_name: str
    variator_plugins: Mapping[Ratio, CompressionPlugin]
    variator_layer: int
    variator_cache: str
    """The layer of vLLM whose metadata tells how entries lie."""

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """(rows,), (rows, d) -> (rows, d)."""
        return torch.ops.vllm.variator_attention(positions, hidden_states, self.variator_name)

    def run(self, positions: Tensor, x: Tensor) -> Tensor:
        """What the op does."""
        host: Any = self
        metadata = metadata_of(self.variator_cache)
        if metadata is None or not metadata.layout.groups:
            return super().forward(positions, x)
        layout = metadata.layout
        members = {plugin: layout.members(x, plugin) for plugin in layout.groups}
        entries = layout.compress(members, x, self._merges(layout))
        if metadata.positions is None:
            last = [layout.members(positions, plugin)[:, -1] for plugin in layout.groups]
            metadata.positions = torch.cat((*last, layout.alone(positions)))
        (query,), (key, value) = _project(host, x, entries)
        query, _ = host.rotary_emb(positions, _normed(host, "q_norm", query), None)
        key, _ = host.rotary_emb(metadata.positions, _normed(host, "k_norm", key), None)
        output, _ = host.o_proj(host.attn(query, key, value))
        return output

    def _merges(self, layout: Layout) -> dict[Ratio, Any]:
        sites = {k: self.variator_plugins[k].at("kv", self.variator_layer) for k in layout.groups}
        return {k: site.compressor for k, site in sites.items() if site}


def _project(attention: Any, x: Tensor, entries: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Queries of `x`, and keys and values of `entries`: the fused projection's weight in two halves."""
    sizes = [attention.q_size, attention.kv_size, attention.kv_size]
    halves = _halves(attention.qkv_proj, attention.q_size)
    if halves is None:  # quantised: the whole projection twice, the other half unused
        query = attention.qkv_proj(x)[0].split(sizes, dim=-1)[:1]
        pair = attention.qkv_proj(entries)[0].split(sizes, dim=-1)[1:]
    else:
        query = [F.linear(x, *halves[0])]
        pair = F.linear(entries, *halves[1]).split(sizes[1:], dim=-1)
    return [part.contiguous() for part in query], [part.contiguous() for part in pair]


def _normed(attention: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(attention, name, None)
    return x if norm is None else norm(x.unflatten(-1, (-1, attention.head_dim))).flatten(-2)


def _halves(projection: Any, queries: int) -> list[tuple[Tensor, Tensor | None]] | None:
    """(weight, bias) of the queries and of keys and values; None where the weight is quantised."""
    weight = getattr(projection, "variator_weight", projection.weight)
    if not isinstance(projection.quant_method, UnquantizedLinearMethod) or not weight.numel():
        return None
    bias = projection.bias
    pieces = (slice(None, queries), slice(queries, None))
    return [(weight[piece], None if bias is None else bias[piece]) for piece in pieces]


def keep_projection(attention: Any) -> None:
    """After loading: vLLM's CPU kernels repack the fused weight and drop it, so keep a copy there."""
    projection = attention.qkv_proj
    if current_platform.is_cpu() and isinstance(projection.quant_method, UnquantizedLinearMethod):
        projection.variator_weight = projection.weight.detach().clone()


def metadata_of(layer_name: str) -> Any:
    """What the running step has for a layer of vLLM; None in a dummy batch."""
    metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
    return metadata.get(layer_name) if isinstance(metadata, dict) else None


def attach_attention(
    attention: Any, plugins: Mapping[Ratio, CompressionPlugin], layer: int, name: str
) -> CompressedAttention | None:
    """Subclass one self-attention in place.

    Where no plugin compresses its keys and values it only gets a block table of its own kind.

    Raises:
        VariatorError: the platform's attention, or this model's, is not one that can hold entries.
    """
    check_attention(attention)
    inner, impl = attention.attn, attention.attn.impl
    sites = {k: plugin.at("kv", layer) for k, plugin in plugins.items()}
    inner.__class__ = EntryAttention
    inner.variator_ratios = tuple((k, site.k) for k, site in sites.items() if site)
    if not inner.variator_ratios:
        return None
    inner.attn_backend, impl.__class__ = CompressedBackend, CompressedImpl
    attention.__class__ = type(
        f"Compressed{type(attention).__name__}", (CompressedAttention, type(attention)), {}
    )
    attention.variator_name, attention.variator_layer = name, layer
    attention.variator_plugins, attention.variator_cache = plugins, inner.layer_name
    return attention


def check_attention(attention: Any) -> None:
    """Refuse what cannot hold entries.

    Raises:
        VariatorError: the platform's attention, or this model's.
    """
    inner = attention.attn
    if type(inner) is not Attention or inner.attn_backend is not CPUAttentionBackend:
        raise VariatorError(
            f"a compressed KV cache needs vLLM's CPU attention, this engine has {inner.attn_backend.get_name()}: "
            'serve plugins with the site "ffn" only'
        )
    impl = inner.impl
    if impl.sliding_window != -1 or impl.alibi_slopes is not None or impl.sinks is not None:
        raise VariatorError("a compressed KV cache needs plain attention: no window, ALiBi or sinks")
    if impl.logits_soft_cap or getattr(attention, "do_llama_4_scaling", False):
        raise VariatorError("a compressed KV cache needs plain attention: no soft cap or query scaling")


def _variator_attention(positions: Tensor, hidden_states: Tensor, name: str) -> Tensor:
    return get_forward_context().no_compile_layers[name].run(positions, hidden_states)


def _variator_attention_fake(positions: Tensor, hidden_states: Tensor, name: str) -> Tensor:
    return torch.empty_like(hidden_states)


direct_register_custom_op("variator_attention", _variator_attention, fake_impl=_variator_attention_fake)
