"""Site "ffn": a pre-hook merges the groups, the frozen FFN runs on the entries, a hook restores the tokens."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from llm_variator.session import current

_WORTH_FILLING = 256  # entries from which rows of zeros behind them cost less than they bring


def hook_ffn(ffn: nn.Module, end: nn.Module, layer: int) -> list[RemovableHandle]:
    """Hooks of one layer; its output appears in `end`."""

    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        session = current()
        if session is None or session.segment is None or session.plugin is None:
            return None
        if session.narrow is not None:
            return None  # the columns read are dense
        if (site := session.plugin.at("ffn", layer)) is None:
            return None
        grouping = session.segment.grouping(site.k)
        if not grouping.has_groups:
            return None
        entries = grouping.compress(args[0], site.compressor)
        session.stash["ffn", layer] = site, grouping, args[0], entries.shape[1]
        session.merged += 1
        return (in_eights(entries),)

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        session = current()
        if session is None or (kept := session.stash.pop(("ffn", layer), None)) is None:
            return None
        site, grouping, x, count = kept
        return grouping.restore(output[:, :count], x, site.decompressor)

    return [ffn.register_forward_pre_hook(before), end.register_forward_hook(after)]


def in_eights(entries: Tensor) -> Tensor:
    """(b, m, d) with rows of zeros behind: half-precision products on a CPU are up to 6 % slower for an odd m."""
    if entries.device.type != "cpu" or entries.dtype.itemsize != 2 or entries.shape[1] < _WORTH_FILLING:
        return entries
    return F.pad(entries, (0, 0, 0, -entries.shape[1] % 8))
