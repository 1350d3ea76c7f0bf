"""What learns, from whom, and how it is saved: a plugin, or a whole model of a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn

from llm_variator.errors import VariatorError
from llm_variator.model import VariatorModel


class Learner(Protocol):
    """A model that is trained, with its teacher."""

    @property
    def model(self) -> Any:
        """The module that the Trainer trains; what is trained requires gradients, nothing else does."""
        ...

    def teaching(self) -> AbstractContextManager[Any]:
        """A block in which the given model computes what is to be learned."""
        ...

    def prepare(self, accelerator: Accelerator) -> None:
        """Bring a separate teacher where the Trainer brings the model, to compute in the same precision."""
        ...

    def save(self, folder: Path) -> None:
        """Write what is trained, its weights as safetensors."""
        ...

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        ...


class PluginLearner:
    """The active plugin of a `VariatorModel`; the teacher is the same model with the plugin off."""

    def __init__(self, model: VariatorModel) -> None:
        self.model = model

    @contextmanager
    def teaching(self) -> Iterator[VariatorModel]:
        """Without the plugin."""
        with self.model.disable_plugin():
            yield self.model

    def prepare(self, accelerator: Accelerator) -> None:
        """Nothing: the teacher is the model."""

    def save(self, folder: Path) -> None:
        """Weights, configuration and card of the plugin."""
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """The plugin's weights."""
        self.model.plugin().load_weights(folder)


class ModelLearner:
    """A Hugging Face model, whole or by LoRA; `extra` is what else is saved beside it (token pruning)."""

    def __init__(self, model: Any, teacher: nn.Module | None = None, extra: Any = None) -> None:
        """`model` and `teacher` may not share weights; without a teacher only the task's own loss is left."""
        self.model = model
        self.extra = extra
        self._teacher = teacher
        self._is_lora = hasattr(model, "peft_config")
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.eval()

    @contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """The separate teacher."""
        if self._teacher is None:
            raise VariatorError("this model has no teacher: it learns from the task's labels alone")
        yield self._teacher

    def prepare(self, accelerator: Accelerator) -> None:
        """The teacher to the model's device, under the same autocast."""
        if self._teacher is not None:
            self._teacher = accelerator.prepare_model(self._teacher, evaluation_mode=True)

    def save(self, folder: Path) -> None:
        """As `save_pretrained` of the model does, in one file."""
        self.model.save_pretrained(folder, **({} if self._is_lora else {"max_shard_size": "1TB"}))
        if self.extra is not None:
            self.extra.save(folder)

    def load(self, folder: Path) -> None:
        """The weights, strictly."""
        if self._is_lora:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.model, load_peft_weights(str(folder), device="cpu"))
            return
        device = next(self.model.parameters()).device
        saved = type(self.model).from_pretrained(folder, dtype=self.model.dtype)
        with torch.no_grad():
            self.model.load_state_dict(saved.to(device).state_dict())
