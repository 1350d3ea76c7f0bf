"""A frozen base model with hooks, and its plugins by name."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial, reduce
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from llm_variator.config import VariatorConfig
from llm_variator.engine.devices import execution_device
from llm_variator.engine.hooks import architecture_of, host_of
from llm_variator.engine.hooks.hook import ATTACHED, refuse_attached
from llm_variator.engine.hooks.selfcheck import check_attachment
from llm_variator.engine.plan import Plan, kv_heads
from llm_variator.engine.plugin import CompressionPlugin, base_signature
from llm_variator.errors import VariatorError

# Choices of open `use_plugin` blocks, by id of the model: private to a thread or task, unlike `set_plugin`.
_scoped: ContextVar[Mapping[int, tuple[tuple[object, str | None], ...]]] = ContextVar(
    "variator_scoped_plugins", default=MappingProxyType({})
)

# Methods of a base that run its layers, or give what does, past `VariatorModel.forward` and `generate`.
_SAFE = {
    "adjust_generation_fn",
    "compute_transition_scores",
    "load_custom_generate",
    "output_modalities",
    "prepare_inputs_for_generation",
}
_RUNNING = {"_sample", "_beam_search", "_assisted_decoding", "_prefill"}
_RUNNING |= {"get_base_model", "get_decoder", "get_encoder"}
_RUNNING |= {name for name in dir(GenerationMixin) if not name.startswith("_")} - _SAFE


class BypassError(VariatorError, AttributeError):
    """Something of the base's that does not go through the plugin; to `hasattr` it is not there."""


class PluginHolder(nn.Module):
    """A base model, frozen, and its plugins by name. Anything not found here is looked up on the base model."""

    def __init__(self, base: PreTrainedModel, config: VariatorConfig | None = None) -> None:
        """Freeze `base` and attach to it; with a `config`, add a new plugin "default" and activate it.

        Raises:
            VariatorError: `base` is not a supported model, or `config` does not fit it.
        """
        super().__init__()
        self.base: Any = base
        if not isinstance(self._host, PreTrainedModel):
            raise VariatorError(f"the base must be a loaded Hugging Face model, got {type(base).__name__}")
        if any(config.is_prompt_learning for config in getattr(base, "peft_config", {}).values()):
            raise VariatorError(
                "the base has soft prompts (PEFT's prompt or prefix tuning), virtual tokens that are no part of a "
                "prompt: wrap the model without them; LoRA works"
            )
        self._architecture = architecture_of(self._host)
        blocks = self._architecture.blocks(self._host)
        refuse_attached(self._host)
        self.signature = base_signature(self._host, len(blocks))
        self._plugins: dict[str, CompressionPlugin] = {}
        self._default: str | None = None
        if config is not None:
            self.add_plugin("default", config)

        self._unfrozen = [parameter for parameter in base.parameters() if parameter.requires_grad]
        self._was_training = base.training
        base.requires_grad_(False)
        base.eval()
        try:
            self._attach()
        except BaseException:
            self._restore()
            raise
        self.train(self._was_training)
        self._default = "default" if config is not None else None

    @property
    def _host(self) -> Any:
        """The Hugging Face model in the base."""
        return host_of(self.base)

    def _attach(self) -> None:
        refuse_attached(self._host)
        self._handles: list[Any] = self._architecture.attach(self._host)
        try:
            check_attachment(self._host, self._architecture, self.signature)
        except BaseException:
            self._detach()
            raise

    def _restore(self) -> None:
        """Give the base its trainable parameters and its mode back."""
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        self.base.train(self._was_training)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        delattr(self._host, ATTACHED)

    def __del__(self, ends: Callable[[], bool] = sys.is_finalizing) -> None:
        # Dropped without `unload`, nobody could call it any more. The base stays frozen: somebody may have gone on
        # with it before garbage is collected. As Python ends, modules and their names are gone already.
        if self.__dict__.get("_handles") and not ends():
            self._detach()

    def __getstate__(self) -> dict[str, Any]:
        # for copy.deepcopy and pickle: hooks belong to their modules, the copy gets its own
        return {**self.__dict__, "_handles": [], "_compiled_call_impl": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    def _replicate_for_data_parallel(self) -> Any:
        raise VariatorError(
            "nn.DataParallel copies a model without its hooks: start one process per GPU (torchrun), or make one GPU "
            "visible (CUDA_VISIBLE_DEVICES=0)"
        )

    def add_plugin(self, name: str, config: VariatorConfig) -> CompressionPlugin:
        """Add a new, untrained plugin (fp32 weights) without activating it."""
        return self._put(name, self._build(config))

    def join_plugins(self, names: Sequence[str], plugin_name: str, **given: Any) -> CompressionPlugin:
        """Add a plugin that does at once what those named do at different sites, without activating it.

        Its weights are copies. To merge in FFNs and keep keys, for instance: one plugin for each, trained apart.

        Args:
            names: of loaded plugins.
            plugin_name: of the new one.
            **given: `dense_head`, `dense_tail` or `decode_block` in place of theirs.

        Raises:
            VariatorError: two have the same site, or they differ in what a plugin says only once and is not given.
        """
        parts = [self.plugin(name) for name in names]
        # each of them was loaded onto this model, under whatever name it was made
        config = VariatorConfig.joined([part.config for part in parts], base=self.signature, **given)
        joined = self._build(config)
        joined.load_state_dict({name: value for part in parts for name, value in part.state_dict().items()})
        dtypes = [parameter.dtype for part in parts for parameter in part.parameters()]
        widest = reduce(torch.promote_types, dtypes or [torch.float32])
        return self._put(plugin_name, joined.to(widest))

    def delete_plugin(self, name: str) -> None:
        """Forget a plugin; if it was active, the model is dense again."""
        self._check(name)
        if self._default == name:
            self._default = None
        del self._plugins[name]
        delattr(self, f"plugin_{name}")

    def set_plugin(self, name: str | None) -> None:
        """Activate a plugin for all threads; None: exactly the base model. A pointer moves, nothing else."""
        self._check(name)
        self._default = name

    @contextlib.contextmanager
    def use_plugin(self, name: str | None) -> Iterator[Self]:
        """Use a plugin inside the block, in this thread (or async task) only; blocks nest.

        A generator function shares its caller's thread: there open the block around each call of the model, not
        around a `yield`.
        """
        self._check(name)
        block = (object(), name)
        _scoped.set({**_scoped.get(), id(self): (*_scoped.get().get(id(self), ()), block)})
        try:
            yield self
        finally:  # others may have been opened in the meantime, by generators that go on
            rest = tuple(one for one in _scoped.get().get(id(self), ()) if one is not block)
            _scoped.set({**_scoped.get(), id(self): rest})

    def disable_plugin(self) -> contextlib.AbstractContextManager[Self]:
        """The base model inside the block."""
        return self.use_plugin(None)

    @property
    def active_plugin(self) -> str | None:
        """Name of the plugin in use here; None: the base model."""
        blocks = _scoped.get().get(id(self))
        return blocks[-1][1] if blocks else self._default

    @property
    def plugins(self) -> dict[str, VariatorConfig]:
        """The loaded plugins: name -> config."""
        return {name: plugin.config for name, plugin in self._plugins.items()}

    def plugin(self, name: str | None = None) -> CompressionPlugin:
        """A plugin's module; by default the active one."""
        name = self.active_plugin if name is None else name
        if name is None:
            raise VariatorError("no plugin is active: name one, or call set_plugin first")
        self._check(name)
        return self._plugins[name]

    def _active(self) -> CompressionPlugin | None:
        name = self.active_plugin
        self._check(name)
        return None if name is None else self._plugins[name]

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self._plugins:
            known = ", ".join(self._plugins) or "none"
            raise VariatorError(f"no plugin named {name!r}; loaded: {known}")

    def _build(self, config: VariatorConfig) -> CompressionPlugin:
        decoder, slides = self._architecture.decoder, partial(self._architecture.slides, self._host)
        heads = kv_heads(self._host.config)
        plan = Plan.of(config, self.signature, decoder=decoder, slides=slides, kv_heads=heads)
        places = {str(place) for place in getattr(self._host, "hf_device_map", {}).values()} - {"cpu", "disk"}
        if plan.selected and len(places) > 1:
            raise VariatorError(
                f"a plugin that keeps keys needs all layers on one GPU, these are spread over {len(places)}: load the "
                "model with device= in place of device_map=, or take a plugin that merges"
            )
        if "cross" in config.sites and self._architecture.answering(self._host) is None:
            raise VariatorError(
                f'site "cross" is for T5 with its decoder; {type(self._host).__name__} has no decoder that reads '
                "an encoder: leave it out of sites"
            )
        return CompressionPlugin(plan, self.signature.hidden_size)

    def _put(self, name: str, plugin: CompressionPlugin) -> CompressionPlugin:
        if name in self._plugins:
            raise VariatorError(
                f"a plugin named {name!r} is loaded already; choose another name or delete it"
            )
        if not name or "." in name:
            raise VariatorError(f"a plugin name must be non-empty and without dots, got {name!r}")
        if self._host.dtype == torch.float16:  # in which the passes compute with finer weights too
            plugin.balance()
        plugin.check_numbers(self._host.dtype)
        blocks = self._architecture.blocks(self._host)
        for layer, own in [(at, own) for (_, at), own in plugin.sites.items()] + [*plugin.selects.items()]:
            own.to(execution_device(blocks[layer]))
        self._plugins[name] = plugin
        self.add_module(f"plugin_{name}", plugin)
        return plugin

    @property
    def generation_config(self) -> Any:
        """The base's, by which `generate` goes: what is set here is set there."""
        return self._host.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self._host.generation_config = config

    def _get_name(self) -> str:
        # what Hugging Face's Trainer asks a model: those of causal language models have labels that it shifts
        return type(self._host).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    @property
    def is_decoder(self) -> bool:
        """Whether the base is a decoder; else it is an encoder (T5, BERT), whose tokens are all compressed."""
        return self._architecture.decoder

    def decoder_only(self, what: str, reason: str) -> None:
        """Raise a `VariatorError` that gives the `reason` unless the base is a decoder."""
        if not self._architecture.decoder:
            raise VariatorError(f"{what} is for decoders, {type(self._host).__name__} is none: {reason}")

    def unload(self) -> PreTrainedModel:
        """Detach every hook and give the base model back as it was; this object is of no use afterwards."""
        if not hasattr(self._host, ATTACHED):
            raise VariatorError("this model has been unloaded already")
        self._detach()
        self._restore()
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "_plugins", "_architecture"):  # not set yet: no base could be loaded
                raise
            found = getattr(self.base, name)
            self._refuse_bypass(name, found)
            return found

    def _refuse_bypass(self, name: str, found: Any) -> None:
        """Raise where something of the base's would run its layers without the plugin."""
        runs = name in _RUNNING
        if isinstance(found, nn.Module):
            layers = self._architecture.blocks(self._host)
            runs = any(module is layers for module in found.modules()) or any(found is one for one in layers)
        if runs:
            raise BypassError(
                f"{name!r} would run the base's layers without the plugin: call the VariatorModel or its generate, "
                f"or write .base.{name} for the base as it is"
            )
