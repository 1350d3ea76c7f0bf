"""Where a model computes, which its parameters do not always say; and small tensors there without waiting for it.

A tensor made of Python's numbers on a GPU has the host wait until the device has done all its work. In a layer that
is a pause of the whole queue, in a decoding step one for each layer: what is made again and again is kept (`places`),
what differs is copied from pinned memory, which nothing waits for (`numbers`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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


@functools.lru_cache(maxsize=4096)
def places(heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(n,) long: `heads` as an index. Every caller gets the same tensor: it is never written."""
    with torch.inference_mode(False):  # so that a pass with gradients can use it too
        return torch.tensor(heads, dtype=torch.long, device=device)


def behind(order: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(n,) long: the index that brings what stands in this `order` back into the order of its numbers."""
    return places(tuple(sorted(range(len(order)), key=order.__getitem__)), device)


def numbers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """(n,) long on `device`."""
    made = torch.tensor(list(values), dtype=torch.long, device="cpu")
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
