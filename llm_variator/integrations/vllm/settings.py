"""What is served: plugins by ratio, the default choice and the policy, read from vLLM's `additional_config`.

Everything that does not fit raises here, at the start and in every process: `vllm_config` carries it all.
"""

from __future__ import annotations

import dataclasses
import importlib
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_variator.config import CONFIG_FILE, BaseSignature, VariatorConfig
from llm_variator.engine.plan import Plan, kv_heads
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.errors import VariatorError
from llm_variator.integrations.policy import LoadPolicy, Policy, Ratio
from llm_variator.integrations.vllm.plan import Shape, whole_step
from llm_variator.integrations.vllm.rows import AUTO, Choice, check_choice, ratio_of
from llm_variator.integrations.vllm.tables import Tables, cut_heads, kind_of, own_tables
from llm_variator.measures.operations import Stack, prefill

KEY = "variator"
"""The key in vLLM's `additional_config`."""
WORKER = "llm_variator.integrations.vllm.worker.ShorteningWorker"
"""vLLM's `worker_cls` where plugins keep keys and values."""
TYPICAL_PROMPT = 1024


@dataclasses.dataclass(frozen=True)
class Served:
    """One plugin as it is served."""

    folder: Path
    plan: Plan
    """What it does to a prompt of the base."""

    @property
    def shape(self) -> Shape:
        """How it splits a prompt."""
        every = {k for layers in self.plan.ratios.values() for k in layers.values() if k > 1}
        return Shape(self.plan.head, self.plan.tail, tuple(sorted(every)))

    @property
    def ratio(self) -> int:
        """What it is named after; single layers and heads may differ."""
        k = self.plan.config.k
        return k if isinstance(k, int) else max(k.values())

    @property
    def harshness(self) -> tuple[bool, float]:
        """Orders plugins by what their answers lose, as well as that can be told unread."""
        heads = [k for layer in self.plan.selected.values() for k in layer]
        merges = bool(self.plan.ratios)
        return merges, self.ratio if merges else -statistics.mean(1 / k for k in heads)

    def build(self, dim: int) -> CompressionPlugin:
        """The plugin's layers with the weights of its file, on the CPU in fp32."""
        plugin = CompressionPlugin(self.plan, dim)
        plugin.load_weights(self.folder)
        return plugin


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of `additional_config["variator"]`, checked."""

    plugins: Mapping[Ratio, Served]
    """By the ratio, or name, that requests ask for."""
    default: Choice
    """Of requests that do not say."""
    policy: Mapping[str, Any]
    """Arguments of `LoadPolicy`; with "class", the path `module:Class` of another policy."""
    costs: Mapping[Ratio, float]
    """Operations of reading a prompt of `TYPICAL_PROMPT` tokens, relative to dense: what `LoadPolicy` reckons with."""
    shares: Mapping[Ratio, float]
    """KV entries of such a prompt, relative to dense."""

    @classmethod
    def of(cls, values: Mapping[str, Any], hf_config: Any) -> Settings:
        """Read `{"plugins": {"k2": folder}, "default": 0, "policy": {...}}` for a model with this config.

        Raises:
            VariatorError: a plugin cannot be served, or does not fit its name or the model.
        """
        if unknown := sorted(set(values) - {"plugins", "default", "policy"}):
            raise VariatorError(f"unknown serving setting {', '.join(unknown)}")
        plugins = dict(
            _served(name, Path(folder), hf_config) for name, folder in values.get("plugins", {}).items()
        )
        default = check_choice(values.get("default", 0), tuple(plugins))
        if default == AUTO and not plugins:
            raise VariatorError('the default "auto" needs at least one plugin')
        stack = Stack.of(hf_config)
        dense = prefill(stack, TYPICAL_PROMPT)
        read = {k: prefill(stack, TYPICAL_PROMPT, one.plan.config) for k, one in plugins.items()}
        costs = {k: one.total / dense.total for k, one in read.items()}
        shares = {k: one.cache_entries / dense.cache_entries for k, one in read.items()}
        settings = cls(plugins, default, values.get("policy", {}), costs, shares)
        if plugins:
            settings.make_policy()
        elif settings.policy:
            raise VariatorError("a policy chooses among plugins: serve some, or leave the policy out")
        return settings

    @property
    def served(self) -> tuple[Ratio, ...]:
        """What requests may ask for, besides 0."""
        return tuple(self.plugins)

    @property
    def gentlest_first(self) -> tuple[Ratio, ...]:
        """The same in the order in which a policy tries them: what merges nothing first."""
        return tuple(sorted(self.plugins, key=lambda k: self.plugins[k].harshness))

    @property
    def shapes(self) -> dict[Ratio, Shape]:
        """How each plugin splits a prompt."""
        return {k: plugin.shape for k, plugin in self.plugins.items()}

    @property
    def compresses_kv(self) -> bool:
        """Whether some plugin compresses the KV cache."""
        return self.selects or any("kv" in plugin.plan.ratios for plugin in self.plugins.values())

    @property
    def selects(self) -> bool:
        """Whether some plugin keeps keys and values, each head its own."""
        return any(plugin.plan.selected for plugin in self.plugins.values())

    def tables(self, hf_config: Any) -> tuple[Tables, frozenset[tuple[int, int]]]:
        """How layers, or heads, share block tables, and the (layer, head) that are made a class of their own."""
        plans = {k: plugin.plan for k, plugin in self.plugins.items()}
        layers = hf_config.num_hidden_layers
        if not self.selects:
            kinds = Counter(kind_of(plans, layer, 0) for layer in range(layers))
            return own_tables(kinds.values()), frozenset()
        return cut_heads(plans, self.shapes, layers, kv_heads(hf_config), TYPICAL_PROMPT)

    def _block_tables(self, layers: int) -> int:
        """Kinds of layers whose caches hold the same entries."""
        if self.selects:
            return 2  # heads of several ratios; of only one in the rarest case
        kv = [plugin.plan.ratios.get("kv", {}) for plugin in self.plugins.values()]
        return len({tuple(ratios.get(layer) for ratios in kv) for layer in range(layers)})

    def make_policy(self) -> Policy:
        """A new policy for `"auto"`.

        Raises:
            VariatorError: it cannot be made from the settings.
        """
        options = dict(self.policy)
        path = options.pop("class", None)
        made: Any = LoadPolicy
        if path is None:
            for what, own in (("costs", self.costs), ("shares", self.shares)):
                options[what] = {**own, **self._by_ratio(what, options.get(what, {}))}
        else:
            module, _, name = str(path).partition(":")
            try:
                made = getattr(importlib.import_module(module), name)
            except (ImportError, AttributeError, ValueError) as error:
                raise VariatorError(
                    f"policy class {path!r} cannot be imported as module:Class ({error})"
                ) from None
        try:
            return made(self.gentlest_first, **options)
        except TypeError as error:
            raise VariatorError(f"policy: {error}") from None

    def _by_ratio(self, what: str, given: Any) -> dict[Ratio, Any]:
        """`{"k2": 0.6}` or `{"2": 0.6}` -> {2: 0.6}: JSON has no numbers for keys."""
        if not isinstance(given, Mapping):
            raise VariatorError(f'policy: {what} are numbers by ratio, as in {{"k2": 0.6}}, not {given!r}')
        found = {
            int(name) if str(name).isdecimal() else ratio_of(str(name)): number
            for name, number in given.items()
        }
        if unknown := [k for k in found if k and k not in self.plugins]:
            served = ", ".join(map(str, self.plugins))
            raise VariatorError(f"policy: {what} of {unknown[0]}, which is not served; {served} are")
        return found

    def check_engine(self, vllm_config: Any) -> None:
        """Refuse engine settings with which compression would be wrong or silently absent.

        Raises:
            VariatorError: naming the setting and the mend.
        """
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        refused = {
            "speculative decoding": vllm_config.speculative_config is not None,
            "a KV connector (kv_transfer_config)": vllm_config.kv_transfer_config is not None,
            "prompt embeddings (enable_prompt_embeds)": vllm_config.model_config.enable_prompt_embeds,
            "decode or prefill context parallelism": parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1,
            "micro-batches (enable_dbo)": parallel.use_ubatching,
            "cudagraph_mode FULL (use FULL_AND_PIECEWISE)": vllm_config.compilation_config.cudagraph_mode
            is not None
            and vllm_config.compilation_config.cudagraph_mode.name == "FULL",
            "disable_hybrid_kv_cache_manager with plugins that compress the KV cache of some layers only": (
                scheduler.disable_hybrid_kv_cache_manager
                and self._block_tables(vllm_config.model_config.hf_config.num_hidden_layers) > 1
            ),
            "prefix caching with a plugin that compresses the KV cache (--no-enable-prefix-caching)": (
                self.compresses_kv and vllm_config.cache_config.enable_prefix_caching
            ),
        }
        if self.selects:
            dtype = getattr(vllm_config.cache_config, "cache_dtype", "auto")
            refused |= {
                "tensor or pipeline parallelism with a plugin that keeps keys and values": (
                    getattr(parallel, "tensor_parallel_size", 1)
                    * getattr(parallel, "pipeline_parallel_size", 1)
                    > 1
                ),
                "a quantised KV cache (kv_cache_dtype) with a plugin that keeps keys and values": (
                    dtype not in ("auto", "float32", "float16", "bfloat16")
                ),
                f"another worker than {WORKER} (worker_cls) with a plugin that keeps keys and values": (
                    getattr(parallel, "worker_cls", WORKER) != WORKER
                ),
            }
        if wrong := [what for what, present in refused.items() if present]:
            raise VariatorError(f"compression plugins do not work with {'; '.join(wrong)}: switch it off")
        need = max((whole_step(shape) for shape in self.shapes.values()), default=0)
        limits = [scheduler.max_num_batched_tokens, scheduler.long_prefill_token_threshold or need]
        if min(limits) < need:
            raise VariatorError(
                f"the plugins need chunks of at least {need} tokens: raise max_num_batched_tokens and "
                f"long_prefill_token_threshold, now {limits[0]} and {scheduler.long_prefill_token_threshold}"
            )


def settings_of(vllm_config: Any) -> Settings:
    """The settings in a `VllmConfig`."""
    return Settings.of(vllm_config.additional_config.get(KEY, {}), vllm_config.model_config.hf_config)


def _served(name: str, folder: Path, hf_config: Any) -> tuple[Ratio, Served]:
    key = ratio_of(name)
    config = VariatorConfig.from_json(folder / CONFIG_FILE)
    if config.base is None:
        raise VariatorError(f"{folder / CONFIG_FILE} does not name its base model; save the plugin again")
    signature = BaseSignature(
        config.base.name, hf_config.model_type, hf_config.hidden_size, hf_config.num_hidden_layers
    )
    try:
        heads = kv_heads(hf_config)
        plan = Plan.of(
            config, signature, decoder=True, slides=lambda layer: slides(hf_config, layer), kv_heads=heads
        )
    except VariatorError as error:
        raise VariatorError(f"{folder}: {error}") from None
    served = Served(folder, plan)
    if "attention" in config.sites:
        raise VariatorError(f'{folder}: the site "attention" is not served in vLLM; use "ffn" and "kv"')
    if config.decode_block is not None:
        raise VariatorError(
            f"{folder}: generated tokens stay dense in vLLM, not in this plugin (decode_block): save it without"
        )
    if isinstance(key, str):
        if not plan.selected:
            raise VariatorError(
                f"{folder} keeps no keys and values: serve it as k{served.ratio}, not as {name}"
            )
    elif served.ratio != key:
        raise VariatorError(
            f"{folder} compresses by {served.ratio}: serve it as k{served.ratio}, not as {name}"
        )
    return key, served


def slides(hf_config: Any, layer: int) -> bool:
    """Whether a layer attends through a sliding window."""
    kinds = getattr(hf_config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] != "full_attention"
    return getattr(hf_config, "sliding_window", None) is not None
