"""Models whose prompts are compressed: vLLM's own classes with their MLPs and attentions subclassed in place.

Nothing of a model's forward is copied. An MLP (or attention) keeps its parameters and names, so that loading,
quantisation, LoRA and tensor parallelism work as ever; only its class changes to one that calls an opaque custom
op. Opaque, because under torch.compile a Python branch on the batch would be traced once, dense.

Tensor parallelism: an MLP's input and output are full-width on every rank (its last linear layer reduces), and so
are the plugin's layers, replicated. Every rank merges and restores the same vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.utils.torch_utils import direct_register_custom_op

from llm_variator.engine.plugin import CompressionPlugin, warn_if_other_weights, weights_digest
from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.plan import Chunk, Layout, Shape
from llm_variator.integrations.vllm.rows_v1 import row_table
from llm_variator.integrations.vllm.settings import Settings, settings_of

logger = logging.getLogger(__name__)

PASS = "variator.pass"
"""Where the running pass hangs in vLLM's forward context."""


class BatchPass:
    """One forward pass: its chunks, the layouts that layers share, and what was really compressed."""

    def __init__(self, chunks: list[Chunk], shapes: Mapping[Ratio, Shape]) -> None:
        self.chunks, self.shapes = chunks, shapes
        self.compressed_rows: list[int] = []
        """Rows that each compressed MLP gave to its frozen layers."""
        self._layouts: dict[tuple[tuple[Ratio, int | None], ...], Layout] = {}

    def layout(self, ratios: Mapping[Ratio, int | None]) -> Layout:
        """The layout for one ratio per plugin, made once."""
        key = tuple(ratios.items())
        if key not in self._layouts:
            self._layouts[key] = Layout(self.chunks, ratios, self.shapes)
        return self._layouts[key]


def running_pass() -> BatchPass | None:
    """The pass that compresses something now, None where all is dense."""
    return get_forward_context().additional_kwargs.get(PASS)


class CompressedFFN(nn.Module):
    """Comes before an MLP's own class: groups through the frozen layers as one vector each."""

    variator_name: str
    variator_plugins: Mapping[Ratio, CompressionPlugin]
    variator_layer: int

    def forward(self, x: Tensor) -> Tensor:
        """(rows, d) -> (rows, d)."""
        return torch.ops.vllm.variator_ffn(x, self.variator_name)

    def run(self, x: Tensor) -> Tensor:
        """What the op does. One call of the frozen layers for all groups and dense rows together."""
        current = running_pass()
        if current is None:
            return super().forward(x)
        sites = {k: plugin.at("ffn", self.variator_layer) for k, plugin in self.variator_plugins.items()}
        layout = current.layout({k: site.k if site else None for k, site in sites.items()})
        if not layout.groups:
            return super().forward(x)
        members = {plugin: layout.members(x, plugin) for plugin in layout.groups}
        chosen = {plugin: sites[plugin] for plugin in layout.groups}
        merge: dict[Ratio, Callable[[Tensor], Tensor]] = {p: s.compressor for p, s in chosen.items() if s}
        restore: dict[Ratio, Any] = {p: s.decompressor for p, s in chosen.items() if s}
        entries = layout.compress(members, x, merge)
        current.compressed_rows.append(len(entries))
        return layout.restore(super().forward(entries), members, x, restore)


def _variator_ffn(x: Tensor, name: str) -> Tensor:
    return get_forward_context().no_compile_layers[name].run(x)


def _variator_ffn_fake(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


direct_register_custom_op("variator_ffn", _variator_ffn, fake_impl=_variator_ffn_fake)


class VariatorMixin:
    """Comes before a model's own class: plugins loaded and attached, every pass planned and checked."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        host: Any = super()
        host.__init__(vllm_config=vllm_config, prefix=prefix)
        self.variator: Settings = settings_of(vllm_config)
        self.variator.check_engine(vllm_config)
        self.variator_rows = row_table(vllm_config)
        self._vllm_config = vllm_config
        model: Any = self
        parameter = next(model.parameters())
        hidden = vllm_config.model_config.hf_config.hidden_size
        self._plugins: dict[Ratio, Any] = {}
        for k, served in self.variator.plugins.items():
            with torch.device("cpu"):
                plugin = served.build(hidden)
            plugin = plugin.to(device=parameter.device, dtype=vllm_config.model_config.dtype).eval()
            self._plugins[k] = plugin.requires_grad_(False)  # in a plain dict: not a part of the checkpoint
        self._parted = self.variator.tables(vllm_config.model_config.hf_config)[1]
        for index in range(model.model.start_layer, model.model.end_layer):
            self._attach(model.model.layers[index], index, f"{prefix}.variator.{index}")
        self._checked = not self._plugins
        _split_graphs_at(vllm_config.compilation_config, "vllm::variator_ffn", "vllm::variator_attention")

    def _attach(self, layer: Any, index: int, name: str) -> None:
        context = self._vllm_config.compilation_config.static_forward_context
        if any(plugin.at("ffn", index) for plugin in self._plugins.values()):
            mlp = layer.mlp
            mlp.__class__ = type(f"Compressed{type(mlp).__name__}", (CompressedFFN, type(mlp)), {})
            mlp.variator_name, mlp.variator_layer = f"{name}.ffn", index
            mlp.variator_plugins = self._plugins
            context[mlp.variator_name] = mlp
        if self.variator.selects:
            from llm_variator.integrations.vllm.attheads import attach_heads

            heads = layer.self_attn, self._plugins, index, f"{name}.attention", context, self._parted
            selecting = attach_heads(*heads)
            context[selecting.variator_name] = selecting
        elif self.variator.compresses_kv:
            from llm_variator.integrations.vllm.attkv import attach_attention

            attention = attach_attention(layer.self_attn, self._plugins, index, f"{name}.attention")
            if attention is not None:
                context[attention.variator_name] = attention

    @staticmethod
    def get_model_state_cls() -> type:
        """The V2 runner's state for this model."""
        from llm_variator.integrations.vllm.state_v2 import VariatorModelState

        return VariatorModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The model's own loading, unaware of plugins."""
        host: Any = super()
        model: Any = self
        loaded = host.load_weights(weights)
        if get_pp_group().is_first_rank and get_tensor_model_parallel_rank() == 0:
            digest = weights_digest(model.model.embed_tokens.weight)
            for served in self.variator.plugins.values():
                assert served.plan.config.base is not None
                warn_if_other_weights(served.folder, served.plan.config.base, digest)
        if self.variator.compresses_kv:
            from llm_variator.integrations.vllm.attkv import keep_projection

            for index in self._layers():
                if any(self._ratios("kv", index).values()):
                    keep_projection(model.model.layers[index].self_attn)
        return loaded

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, its prompts compressed as their requests ask."""
        host: Any = super()
        if not self._plugins or not is_forward_context_available():
            return host.forward(input_ids, positions, *args, **kwargs)
        context = get_forward_context()
        if not isinstance(context.attn_metadata, dict | None):
            raise RuntimeError("llm_variator: this pass is split into micro-batches, which is not supported")
        if not context.attn_metadata:  # a dummy batch: profiling, warming up
            if not self._checked:
                self._self_check(host, context, input_ids, positions, *args, **kwargs)
            return host.forward(input_ids, positions, *args, **kwargs)
        current = self._pass(next(iter(context.attn_metadata.values())))
        return self._run(host, context, current, input_ids, positions, *args, **kwargs)

    def _pass(self, metadata: Any) -> BatchPass | None:
        table = self.variator_rows
        if not table.any_plugin or getattr(metadata, "max_query_len", 2) <= 1:
            return None  # one token per request is never a group
        chunks = table.prepared
        if chunks is None:
            chunks = table.chunks(metadata.query_start_loc.tolist(), metadata.seq_lens.tolist())
        return BatchPass(chunks, self.variator.shapes)

    def _run(self, host: Any, context: Any, current: BatchPass | None, *args: Any, **kwargs: Any) -> Any:
        if current is None:
            return host.forward(*args, **kwargs)
        context.additional_kwargs[PASS] = current
        try:
            output = host.forward(*args, **kwargs)
        finally:
            del context.additional_kwargs[PASS]
        self._check(current)
        return output

    def _check(self, current: BatchPass) -> None:
        """Every compressed MLP must have run on fewer rows: a silent dense run would cost what we promise to save."""
        expected = [
            layout.entries
            for index in self._layers()
            if (layout := current.layout(self._ratios("ffn", index))).groups
        ]
        if current.compressed_rows != expected:
            raise RuntimeError(
                f"llm_variator: compression did not run in {len(expected)} layers as planned "
                f"(ran in {len(current.compressed_rows)}); please report this vLLM configuration"
            )

    def _layers(self) -> range:
        model: Any = self
        return range(model.model.start_layer, model.model.end_layer)

    def _ratios(self, site: str, index: int) -> dict[Ratio, int | None]:
        found = {k: plugin.at(site, index) for k, plugin in self._plugins.items()}
        return {k: part.k if part else None for k, part in found.items()}

    def _self_check(
        self, host: Any, context: Any, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """At start, on the runner's dummy batch and through its compiled graph: each plugin must compress it."""
        rows = len(positions)
        for k, served in self.variator.plugins.items():
            current = BatchPass([Chunk(0, rows, 0, rows, k)], self.variator.shapes)
            self._run(host, context, current, input_ids, positions, *args, **kwargs)
            logger.info(
                "self-check: %s compresses, %s", served.folder.name, sorted(set(current.compressed_rows))
            )
        self._checked = True


def _split_graphs_at(compilation: Any, *ops: str) -> None:
    """CUDA graphs must not swallow our ops: what they do depends on the batch."""
    if compilation.splitting_ops:
        compilation.splitting_ops.extend(op for op in ops if op not in compilation.splitting_ops)


class VariatorLlamaForCausalLM(VariatorMixin, LlamaForCausalLM):
    """Llama with compressed prompts."""


class VariatorMistralForCausalLM(VariatorMixin, MistralForCausalLM):
    """Mistral with compressed prompts."""


class VariatorQwen2ForCausalLM(VariatorMixin, Qwen2ForCausalLM):
    """Qwen2 with compressed prompts."""


class VariatorQwen3ForCausalLM(VariatorMixin, Qwen3ForCausalLM):
    """Qwen3 with compressed prompts."""
