"""Where a model computes, which its parameters do not always say."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def input_device(base: Any) -> torch.device:
    """Where the base wants its token ids."""
    return execution_device(base.get_input_embeddings())


def execution_device(block: nn.Module) -> torch.device:
    """Where a layer computes: with `device_map` its weights may lie elsewhere between passes."""
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next(block.parameters()).device
