"""CPUs that have no products in bfloat16 or float16: torch computes them there by plain loops."""

from __future__ import annotations

import platform

import torch

_X86 = ("x86_64", "AMD64", "i386", "i686")
# What torch itself asks before it multiplies by its library.
_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def complaint(dtype: torch.dtype) -> str | None:
    """What is wrong with computing in `dtype` on this CPU, in words; None where nothing is."""
    if platform.machine() not in _X86 or multiplies(dtype):
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no products in {name}: by plain loops they take tens of times as long as in float32"


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has products in `dtype` on this x86 CPU that are more than plain loops."""
    if dtype not in _ASKED or not torch.backends.mkldnn.is_available():  # without it torch cannot be asked
        return True
    return bool(getattr(torch.ops.mkldnn, _ASKED[dtype])())
