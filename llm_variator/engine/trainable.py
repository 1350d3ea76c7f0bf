"""A holder of plugins as other people's training loops see it: what is trained, saved, and kept in memory."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Self

from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from llm_variator.engine.holder import PluginHolder
from llm_variator.engine.session import current, scope
from llm_variator.errors import VariatorError


class TrainableHolder(PluginHolder):
    """Plugins are trained and saved, the base is neither: for Hugging Face's Trainer and loops like it."""

    _checkpointing = False

    def train(self, mode: bool = True) -> Self:
        """Training mode for plugins. The frozen base stays in evaluation mode: dropout there only adds noise."""
        super().train(mode)
        self.base.eval()
        if mode:  # also a LoRA that was put on after wrapping: no checkpoint would hold it
            self.base.requires_grad_(False)
        if self._checkpointing:  # transformers checkpoints a layer only while that layer itself is training
            for module in self.base.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = mode
        return self

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """The plugins' weights; those of the frozen base are its own."""
        destination = OrderedDict() if destination is None else destination
        for name, plugin in self._plugins.items():
            plugin.state_dict(destination=destination, prefix=f"{prefix}plugin_{name}.", keep_vars=keep_vars)
        return destination

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take the plugins' weights back.

        Raises:
            VariatorError: keys are missing or surplus, and `strict`.
        """
        own = self.state_dict()
        missing, surplus = [*(own.keys() - state_dict.keys())], [*(state_dict.keys() - own.keys())]
        if strict and (missing or surplus):
            raise VariatorError(
                f"these are not the plugins' weights: {len(missing)} missing {missing[:2]}, {len(surplus)} surplus "
                f"{surplus[:2]}; the base's are loaded with the base"
            )
        weights = {name: value for name, value in state_dict.items() if name in own}
        super().load_state_dict(weights, strict=False, assign=assign)
        return _IncompatibleKeys(missing, surplus)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Recompute the base's layers in the backward pass, with the plugin that the forward pass used."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise VariatorError("gradient checkpointing of a frozen base needs use_reentrant=False")
        options["context_fn"] = lambda: (contextlib.nullcontext(), scope(current()))
        self._switch_checkpointing("enable", options, **more)
        self._checkpointing = True
        self.train(self.training)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """The same under its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **more)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self._switch_checkpointing("disable")
        self._checkpointing = False
        self.train(self.training)

    def activation_checkpointing_disable(self) -> None:
        """The same under its newer name."""
        self.gradient_checkpointing_disable()

    def _switch_checkpointing(self, verb: str, *options: Any, **more: Any) -> None:
        new, old = (f"{kind}_checkpointing_{verb}" for kind in ("activation", "gradient"))
        getattr(self._host, new if hasattr(self._host, new) else old)(*options, **more)

    def print_trainable_parameters(self) -> None:
        """Print the active plugin's parameter count beside the base's."""
        trainable = sum(p.numel() for p in self.plugin().parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.base.parameters())
        print(f"plugin {trainable:,} trainable parameters, base {total:,} frozen: {trainable / total:.2%}")

    def unload(self) -> PreTrainedModel:
        """Detach every hook and give the base model back as it was; this object is of no use afterwards."""
        if self._checkpointing:
            self._switch_checkpointing("disable")
        return super().unload()
