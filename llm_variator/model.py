"""`VariatorModel`: a frozen Hugging Face model with compression plugins that can be swapped at run time."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_variator.architectures import architecture_of
from llm_variator.cache import KVCacheReport, is_compressed
from llm_variator.config import CONFIG_FILE, BaseSignature, VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.loading import load_model, plugin_folder
from llm_variator.plugin import CompressionPlugin, Ratios
from llm_variator.session import Session, current, scope

logger = logging.getLogger(__name__)

# Plugin choices of `use_plugin` blocks, by id of the model: private to a thread or task, unlike `set_plugin`.
_scoped: ContextVar[Mapping[int, str | None]] = ContextVar(
    "variator_scoped_plugins", default=MappingProxyType({})
)

_UNSUPPORTED_GENERATION = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt-lookup decoding",
    "assistant_early_exit": "assisted decoding",
    "prefill_chunk_size": "chunked prefill",
}


class VariatorModel(nn.Module):
    """A base model, frozen, and its plugins by name. Anything not found here is looked up on the base model."""

    def __init__(self, base: PreTrainedModel, config: VariatorConfig | None = None) -> None:
        """Freeze `base` and attach to it; with a `config`, add a new plugin "default" and activate it.

        Raises:
            VariatorError: `base` is not a supported model, or `config` does not fit it.
        """
        super().__init__()
        host: Any = base
        self._host: Any = host.get_base_model() if hasattr(host, "get_base_model") else host
        if not isinstance(self._host, PreTrainedModel):
            raise VariatorError(f"the base must be a loaded Hugging Face model, got {type(base).__name__}")
        self._architecture = architecture_of(self._host)
        blocks = self._architecture.blocks(self._host)
        if getattr(self._host, "_variator_attached", False):
            raise VariatorError(
                "this base already has a VariatorModel or token pruning: use it, or unload() or remove() it first"
            )
        self.signature = _signature(self._host, len(blocks))
        self.base: Any = base
        self._plugins: dict[str, CompressionPlugin] = {}
        self._default: str | None = None
        self._report: KVCacheReport | None = None
        self._checkpointing = False
        self.skip_unread = True
        """Leave out what nobody reads of a decoder's last layer: see `architectures.unread`."""
        if config is not None:
            self.add_plugin("default", config)

        self._unfrozen = [parameter for parameter in base.parameters() if parameter.requires_grad]
        self._was_training = base.training
        base.requires_grad_(False)
        base.eval()
        self._host._variator_attached = True  # type: ignore[assignment]
        self._handles = self._architecture.attach(self._host)
        self._default = "default" if config is not None else None

    # --- plugins

    @classmethod
    def from_pretrained(
        cls,
        base: PreTrainedModel | str,
        plugin: str | os.PathLike[str],
        plugin_name: str = "default",
        **kwargs: Any,
    ) -> VariatorModel:
        """Attach a saved plugin (folder, hub id or shipped name such as "smollm2-135m/k2") and activate it.

        `base`: a loaded model, or a name for `loading.load_model`, which gets `kwargs` (dtype, device, ...).
        """
        model = cls(load_model(base, **kwargs) if isinstance(base, str) else base)
        model.load_plugin(plugin, plugin_name)
        model.set_plugin(plugin_name)
        return model

    def add_plugin(self, name: str, config: VariatorConfig) -> CompressionPlugin:
        """Add a new, untrained plugin (fp32 weights) without activating it."""
        return self._put(name, self._build(config))

    def load_plugin(
        self, plugin: str | os.PathLike[str], plugin_name: str, *, dtype: torch.dtype | None = None
    ) -> CompressionPlugin:
        """Load a saved plugin without activating it, in `dtype` (default: the base's). Nothing changes on error."""
        folder = plugin_folder(plugin)
        config = VariatorConfig.from_json(folder / CONFIG_FILE)
        if config.base is None:
            raise VariatorError(f"{folder / CONFIG_FILE} does not name its base model; save the plugin again")
        try:
            built = self._build(config)
        except VariatorError as error:
            raise VariatorError(f"{folder}: {error}") from None
        built.load_weights(folder)
        if config.base.weights and self.signature.weights not in ("", config.base.weights):
            logger.warning(
                "%s was trained on %s with other weights than this model's; expect lower quality unless this "
                "model is fine-tuned from it",
                folder,
                config.base.name,
            )
        return self._put(plugin_name, built.to(dtype or self._host.dtype))

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
    def use_plugin(self, name: str | None) -> Iterator[VariatorModel]:
        """Use a plugin inside the block, in this thread (or async task) only; blocks nest."""
        self._check(name)
        token = _scoped.set({**_scoped.get(), id(self): name})
        try:
            yield self
        finally:
            _scoped.reset(token)

    def disable_plugin(self) -> contextlib.AbstractContextManager[VariatorModel]:
        """The base model inside the block."""
        return self.use_plugin(None)

    @property
    def active_plugin(self) -> str | None:
        """Name of the plugin in use here; None: the base model."""
        return _scoped.get().get(id(self), self._default)

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
        return None if name is None else self._plugins[name]

    def _check(self, name: str | None) -> None:
        if name is not None and name not in self._plugins:
            known = ", ".join(self._plugins) or "none"
            raise VariatorError(f"no plugin named {name!r}; loaded: {known}")

    def _build(self, config: VariatorConfig) -> CompressionPlugin:
        config = config.resolved(self.signature, decoder=self._architecture.decoder)
        return CompressionPlugin(config, self._ratios(config), self.signature.hidden_size)

    def _ratios(self, config: VariatorConfig) -> Ratios:
        """What is attached where. Layers with a sliding window keep their attention dense: its cache is short."""
        ratios: dict[str, dict[int, int]] = {}
        for site in config.sites:
            if site == "cross" and self._architecture.answering(self._host) is None:
                raise VariatorError(
                    f'site "cross" is for T5 with its decoder; {type(self._host).__name__} has no decoder that reads '
                    "an encoder: leave it out of sites"
                )
            ratios[site] = {
                layer: k
                for layer in range(self.signature.num_layers)
                if (k := config.ratio(site, layer)) is not None
                and (site in ("ffn", "cross") or not self._architecture.slides(self._host, layer))
            }
            if not ratios[site]:
                raise VariatorError(
                    f"site {site!r} has no layer left in {self.signature.name!r}: `layers` or `k_per_layer` leave "
                    "all dense, or every layer has a sliding window (whose attention is not compressed)"
                )
        return ratios

    def _put(self, name: str, plugin: CompressionPlugin) -> CompressionPlugin:
        if name in self._plugins:
            raise VariatorError(
                f"a plugin named {name!r} is loaded already; choose another name or delete it"
            )
        if not name or "." in name:
            raise VariatorError(f"a plugin name must be non-empty and without dots, got {name!r}")
        for (_, layer), site in plugin.sites.items():
            site.to(next(self._architecture.blocks(self._host)[layer].parameters()).device)
        self._plugins[name] = plugin
        self.add_module(f"plugin_{name}", plugin)
        return plugin

    # --- running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        prompt_length: int | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward with the prompt compressed by the active plugin; returns what the base returns.

        Args:
            input_ids: (rows, tokens).
            attention_mask: 2D, over cache and input; None: no padding.
            prompt_length: the first so many tokens of each row are prompt, the rest stays dense (teacher
                forcing); an int, or one per row (rows,), padding not counted. None: all tokens are prompt; a
                single token after a cache is always dense. Not for encoders (T5, BERT), which compress all
                of their tokens.
            **kwargs: the base's further arguments (`past_key_values`, `labels`, ...).
        """
        if prompt_length is not None:
            self.decoder_only("prompt_length", "all tokens of an encoder are compressed, leave it out")
        plugin = self._active()
        if plugin is None and not is_compressed(kwargs.get("past_key_values")):
            return self.base(input_ids, attention_mask, **kwargs)
        if self.training:
            kwargs.setdefault("use_cache", False)
        prompts = prompt_length.tolist() if isinstance(prompt_length, Tensor) else prompt_length
        session = Session(plugin, prompts, skip_unread=self.skip_unread)
        with scope(session):
            output = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self._remember(session)
        return output

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """Hugging Face's `generate` with the prompt compressed by the active plugin; decoding is dense.

        Right-padded batches are re-padded on the left first. A cache of an earlier turn can be continued: each
        new prompt segment is compressed in its turn. Of T5 the prompt is the encoder's input, and all of the
        decoder's ways to generate are as ever.
        """
        if not self._host.can_generate():
            raise VariatorError(
                f"{type(self._host).__name__} cannot generate: it has no language-model decoder"
            )
        plugin = self._active()
        cache = kwargs.get("past_key_values")
        if inputs is not None:
            kwargs["input_ids"] = inputs
        if plugin is None and not is_compressed(cache):
            return self.base.generate(**kwargs)
        if self._architecture.decoder:
            _check_generation(self._host, plugin, kwargs)
            if cache is None or not cache.get_seq_length():
                _pad_left(kwargs)
        session = Session(plugin, generating=True, skip_unread=self.skip_unread)
        with scope(session):
            output = self.base.generate(**kwargs)
        if session.cache is not None:
            session.cache.ends_before_last_token = True  # type: ignore[attr-defined]
        self._remember(session)
        return output

    def kv_cache_report(self, cache: Any = None) -> KVCacheReport:
        """Entries and bytes per layer of `cache`, by default as they were after the last compressed call."""
        self.decoder_only("kv_cache_report", "an encoder keeps no KV cache")
        if cache is not None:
            return KVCacheReport.of(cache)
        if self._report is None:
            raise VariatorError(
                "no cache to report yet: run generate or forward(use_cache=True) with a plugin first"
            )
        return self._report

    @property
    def is_decoder(self) -> bool:
        """Whether the base is a decoder; else it is an encoder (T5, BERT), whose tokens are all compressed."""
        return self._architecture.decoder

    def decoder_only(self, what: str, reason: str) -> None:
        """Raise a `VariatorError` that gives the `reason` unless the base is a decoder."""
        if not self._architecture.decoder:
            raise VariatorError(f"{what} is for decoders, {type(self._host).__name__} is none: {reason}")

    def _remember(self, session: Session) -> None:
        if session.cache is not None:
            self._report = KVCacheReport.of(session.cache)

    # --- training

    def train(self, mode: bool = True) -> VariatorModel:
        """Training mode for plugins. The frozen base stays in evaluation mode: dropout there only adds noise."""
        super().train(mode)
        self.base.eval()
        if self._checkpointing:  # transformers checkpoints a layer only while that layer itself is training
            for module in self.base.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = mode
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Recompute the base's layers in the backward pass, with the plugin that the forward pass used."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise VariatorError("gradient checkpointing of a frozen base needs use_reentrant=False")
        options["context_fn"] = lambda: (contextlib.nullcontext(), scope(current()))
        self._switch_checkpointing("enable", options)
        self._checkpointing = True
        self.train(self.training)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self._switch_checkpointing("disable")
        self._checkpointing = False
        self.train(self.training)

    def _switch_checkpointing(self, verb: str, *options: Any) -> None:
        new, old = (
            f"{kind}_checkpointing_{verb}" for kind in ("activation", "gradient")
        )  # new name, old name
        getattr(self._host, new if hasattr(self._host, new) else old)(*options)

    def print_trainable_parameters(self) -> None:
        """Print the active plugin's parameter count beside the base's."""
        trainable = sum(p.numel() for p in self.plugin().parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.base.parameters())
        print(f"plugin {trainable:,} trainable parameters, base {total:,} frozen: {trainable / total:.2%}")

    # --- files

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        plugin_name: str | None = None,
        dtype: torch.dtype | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a plugin (default: the active one): weights, config and a model card that lists `facts`.

        `dtype`: of the saved weights, default as they are. The base model is never written.
        """
        plugin = self.plugin(plugin_name)
        plugin.save(folder, dtype=dtype, card=plugin.card(facts))

    def push_to_hub(
        self, repo_id: str, *, plugin_name: str | None = None, private: bool | None = None
    ) -> str:
        """Upload a plugin to the Hugging Face hub; returns the commit's address."""
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, plugin_name=plugin_name)
            api = HfApi()
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo, folder_path=folder))

    def unload(self) -> PreTrainedModel:
        """Detach every hook and give the base model back as it was; this object is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._checkpointing:
            self._switch_checkpointing("disable")
        del self._host._variator_attached
        for parameter in self._unfrozen:
            parameter.requires_grad_(True)
        self.base.train(self._was_training)
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "_host", "_plugins"):  # not set yet: the base could not be loaded
                raise
            return getattr(self.base, name)


def _check_generation(
    host: PreTrainedModel, plugin: CompressionPlugin | None, kwargs: Mapping[str, Any]
) -> None:
    config = kwargs.get("generation_config") or host.generation_config
    for name, what in _UNSUPPORTED_GENERATION.items():
        if kwargs.get(name) or getattr(config, name, None):
            raise VariatorError(
                f"{what} ({name}) does not work with a compressed prompt; leave it out or disable the plugin"
            )
    implementation = kwargs.get("cache_implementation") or config.cache_implementation
    if plugin is not None and plugin.cache_layers and implementation not in (None, "dynamic"):
        raise VariatorError(
            f"cache_implementation={implementation!r} does not work with a compressed KV cache; leave it out"
        )


def _pad_left(kwargs: dict[str, Any]) -> None:
    """Move right padding to the left, row by row; generation continues at the right edge."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is None or mask is None or mask.ndim != 2 or mask.shape != ids.shape or bool(mask[:, -1].all()):
        return
    order = mask.bool().long().argsort(dim=1, stable=True)  # padding first, tokens in their order
    kwargs["input_ids"], kwargs["attention_mask"] = ids.gather(1, order), mask.gather(1, order)


def _signature(host: Any, num_layers: int) -> BaseSignature:
    config = host.config
    name = getattr(config, "_name_or_path", "") or config.model_type
    if Path(name).is_absolute():
        name = Path(name).name
    weight = host.get_input_embeddings().weight
    sample = b""
    if weight.device.type != "meta" and weight.is_floating_point():
        sample = (
            weight.detach()[:64].to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
        )
    digest = hashlib.sha256(sample).hexdigest()[:16] if sample else ""
    return BaseSignature(name, config.model_type, config.hidden_size, num_layers, digest)
