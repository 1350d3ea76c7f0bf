"""Site "ffn": a pre-hook merges the groups, the frozen FFN runs on the entries, a hook restores the tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from llm_variator.engine.hooks.hook import Hook
from llm_variator.engine.session import current_pass

_WORTH_FILLING = 256  # entries from which rows of zeros behind them cost less than they bring


def hook_ffn(ffn: nn.Module, end: nn.Module, layer: int) -> list[RemovableHandle]:
    """Hooks of one layer; its output appears in `end`."""

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        now = current_pass()
        if now is None or now.segment is None or now.plugin is None:
            return None
        if now.narrow is not None:
            return None  # the columns read are dense
        if (site := now.plugin.at("ffn", layer)) is None:
            return None
        grouping = now.segment.grouping(site.k)
        if not grouping.has_groups:
            return None
        entries = grouping.compress(args[0], site.compressor)
        now.ffn[layer] = site, grouping, args[0], entries.shape[1]
        return (in_eights(entries),)

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        now = current_pass()
        if now is None or (kept := now.ffn.pop(layer, None)) is None:
            return None
        site, grouping, x, count = kept
        now.merged.append(("ffn", layer))
        return grouping.restore(output[:, :count], x, site.decompressor)

    return [ffn.register_forward_pre_hook(Hook(before)), end.register_forward_hook(Hook(after))]


def in_eights(entries: Tensor) -> Tensor:
    """(b, m, d) with rows of zeros behind: half-precision products on a CPU are up to 6 % slower for an odd m."""
    if entries.device.type != "cpu" or entries.dtype.itemsize != 2 or entries.shape[1] < _WORTH_FILLING:
        return entries
    return F.pad(entries, (0, 0, 0, -entries.shape[1] % 8))
