"""`bench compare`: the plugin's own arithmetic beside the straightforward formulation of the same equations.

`PlainLayers` builds the concatenation of every token with its group's output, as section 3.2 of the paper is
written down: k repeated outputs, one matrix product over 2d columns. Same weights, same results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_variator.bench.setting import DENSE, Setting, Settings
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.hooks import architecture_of
from llm_variator.engine.layers import HiddenCompressor, HiddenDecompressor
from llm_variator.errors import VariatorError
from llm_variator.measures.operations import EncoderShape, Stack
from llm_variator.measures.timing import Case, bar, ratio, timed


@dataclass(frozen=True, kw_only=True)
class Compare(Settings):
    """The plugin's arithmetic, fused and plain.

    One FFN at the model's width, a prompt of whole groups of every ratio. of dense: over the dense FFN's time in the
    same repetition. Rows named plain: the equations with concatenation and repetition, same weights.
    """

    plugins: tuple[str, ...] = ("ffn:2", "ffn:4", "ffn:8")
    tokens: tuple[PositiveInt, ...] = (2048,)

    def __post_init__(self) -> None:
        super().__post_init__()
        for spec in self.measured():
            if spec.saved is not None:
                raise VariatorError(f"bench compare makes its own adapters: give SITES:K in place of {spec}")
            if spec.keep is not None:
                raise VariatorError(
                    f"bench compare times how groups are merged, and {spec} merges none: leave it out"
                )
            if spec.sites != ("ffn",):
                raise VariatorError(f"bench compare times one FFN: give ffn:{spec.k} in place of {spec}")
        if min(self.tokens) < (least := math.lcm(*(spec.k for spec in self.measured()))):
            raise VariatorError(
                f"--tokens {min(self.tokens)} hold no whole groups of all ratios: give {least} or more"
            )


class PlainLayers(nn.Module):
    """Merge and restore as the equations are written, around any frozen layer."""

    def __init__(self, compressor: HiddenCompressor, decompressor: HiddenDecompressor) -> None:
        super().__init__()
        self.compressor, self.decompressor = compressor, decompressor

    def merge(self, x: Tensor) -> Tensor:
        """(b, n, d) -> (b, n/k, d)."""
        k, layer = self.compressor.k, self.compressor
        groups = x.view(x.shape[0], -1, k, x.shape[-1])
        joined = torch.cat([groups[:, :, j] for j in range(k)], dim=-1)
        weights = F.softmax(F.linear(joined, layer.weight, layer.bias), dim=-1)
        return (weights.unsqueeze(-1) * groups).sum(dim=2)

    def restore(self, merged: Tensor, x: Tensor) -> Tensor:
        """(b, n/k, d), (b, n, d) -> (b, n, d)."""
        repeated = merged.repeat_interleave(self.compressor.k, dim=1)
        inner = self.decompressor.down(torch.cat((repeated, x), dim=-1))
        if self.decompressor.activation == "tanh":
            inner = inner.tanh()
        return repeated + self.decompressor.up(inner)


def fused(compressor: HiddenCompressor, decompressor: HiddenDecompressor, ffn: Any, x: Tensor) -> Tensor:
    """What the hooks compute for a prompt of whole groups."""
    groups = x.unflatten(1, (-1, compressor.k))
    return decompressor(ffn(compressor(groups)), groups).flatten(1, 2)


def rows(setting: Setting[Compare]) -> list[dict[str, Any]]:
    """Dense FFN; FFN with a plugin, both ways; merge and restore alone, both ways."""
    settings, base = setting.settings, setting.base
    shape: Any = Stack if setting.model.is_decoder else EncoderShape
    dim = shape.of(base.config).dim
    ffn = _ffn(setting)
    ratios = sorted({spec.k for spec in settings.measured()})
    found = []
    total = (1 + 4 * len(ratios)) * len(settings.tokens) * (settings.repetitions + 1)
    with bar(total, "compare") as advance, torch.inference_mode():
        for asked in settings.tokens:
            tokens = asked - asked % math.lcm(*ratios)
            x = torch.randn(1, tokens, dim, generator=setting.generator).to(setting.device, base.dtype)
            cases = {DENSE: _case(ffn, x)}
            for k in ratios:
                cases |= _ways(setting, k, dim, ffn, x)
            seconds = setting.interleaved(cases, advance)
            for name in cases:
                found.append({"case": name, "tokens": tokens, "batch": 1, **timed(seconds, name, DENSE)})
            for k in ratios:
                gain = ratio(seconds[f"plain merge+restore k={k}"], seconds[f"merge+restore k={k}"])
                row = {"case": f"plain over fused, k={k}", "tokens": tokens, "gain": gain.median}
                found.append(row | {"gain_low": gain.low, "gain_high": gain.high})
    return found


def _case(function: Callable[[Tensor], Any], x: Tensor) -> Case:
    return Case(lambda _: function(x))


def _ways(setting: Setting[Compare], k: int, dim: int, ffn: Any, x: Tensor) -> dict[str, Case]:
    with torch.device(setting.device):
        compressor, decompressor = HiddenCompressor(dim, k), HiddenDecompressor(dim, setting.settings.r)
    setting.randomise(compressor)
    setting.randomise(decompressor)
    plain = PlainLayers(compressor, decompressor)
    merged = compressor(x.unflatten(1, (-1, k)))
    return {
        f"FFN, plugin k={k}": Case(lambda _: fused(compressor, decompressor, ffn, x)),
        f"plain FFN, plugin k={k}": Case(lambda _: plain.restore(ffn(plain.merge(x)), x)),
        f"merge+restore k={k}": Case(lambda _: fused(compressor, decompressor, lambda g: merged, x)),
        f"plain merge+restore k={k}": Case(lambda _: (plain.merge(x), plain.restore(merged, x))),
    }


def _ffn(setting: Setting[Compare]) -> Any:
    table = architecture_of(setting.base)
    block = table.blocks(setting.base)[0]
    if not table.ffn_end:
        return block.get_submodule(table.ffn)
    first, last = block.get_submodule(table.ffn), block.get_submodule(table.ffn_end)
    return lambda x: last(first(x))
