"""The model of a command that measures."""

from __future__ import annotations

from llm_variator.cli.flags import BaseModel
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model


def load_variator(settings: BaseModel) -> VariatorModel:
    """The model that the flags name, without a plugin and in evaluation mode."""
    return VariatorModel(load_model(settings.model, device=settings.device, **settings.loading())).eval()
