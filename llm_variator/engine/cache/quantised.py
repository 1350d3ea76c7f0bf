"""Keys and values in 4 or 8 bits: every vector of a head by itself, so that entries can be cut, picked and shared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from llm_variator.errors import VariatorError

BITS = (4, 8)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """A tensor (b, kv_heads, n, head_dim) as whole numbers between the least and greatest of each vector."""

    codes: Tensor
    """(b, kv_heads, n, head_dim) uint8; with 4 bits two codes in one, so half as wide."""
    scale: Tensor
    """(b, kv_heads, n, 1) fp16: what one step is worth."""
    low: Tensor
    """(b, kv_heads, n, 1) fp16: the least value."""
    bits: int
    dtype: torch.dtype
    """Of the tensor, and of `dense`."""

    @classmethod
    def of(cls, tensor: Tensor, bits: int) -> Quantised:
        """Quantise `tensor`. Its greatest error is half a step: (greatest - least) / (2^bits - 1) / 2, and rounding.

        Raises:
            VariatorError: `bits` is neither 4 nor 8, or 4 with an odd head_dim.
        """
        if bits not in BITS or (bits == 4 and tensor.shape[-1] % 2):
            raise VariatorError(f"bits must be 4 (of an even head_dim) or 8, got {bits!r}")
        steps, values = 2**bits - 1, tensor.float()
        low = values.amin(-1, keepdim=True).half()
        scale = ((values.amax(-1, keepdim=True) - low.float()) / steps).clamp(min=1e-7).half()
        codes = (
            ((values - low.float()) / scale.float().clamp(min=1e-7)).round().clamp(0, steps).to(torch.uint8)
        )
        if bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        return cls(codes, scale, low, bits, tensor.dtype)

    def dense(self) -> Tensor:
        """The tensor again, as nearly as the bits allow."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        return (codes.float() * self.scale.float() + self.low.float()).to(self.dtype)

    def map(self, change: Callable[[Tensor], Tensor]) -> Quantised:
        """Pick or repeat rows or entries."""
        return dataclasses.replace(
            self, codes=change(self.codes), scale=change(self.scale), low=change(self.low)
        )

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        """Of the tensor."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * (8 // self.bits)))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes


def dense(tensor: Tensor | Quantised) -> Tensor:
    """The tensor itself."""
    return tensor.dense() if isinstance(tensor, Quantised) else tensor


def change(tensor: Tensor | Quantised, how: Callable[[Tensor], Tensor]) -> Tensor | Quantised:
    """Pick or repeat rows or entries of either."""
    return tensor.map(how) if isinstance(tensor, Quantised) else how(tensor)
