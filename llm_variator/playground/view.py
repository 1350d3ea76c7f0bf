"""What the picture of a document shows: which heads hold which token, and the groups around the FFNs. No HTML."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm_variator.engine.contexts import CompressedContext
from llm_variator.engine.groups import split
from llm_variator.measures.compare import DENSE
from llm_variator.playground.panels import label


@dataclasses.dataclass(frozen=True)
class FFNGroups:
    """How a document's neighbours share one pass through the FFNs of some layers."""

    k: int
    head: int
    """Tokens before the first group."""
    groups: int
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """One document under one plugin.

    Attributes:
        plugin: its name, or `DENSE`.
        held: (layers, KV heads, tokens) bool: whether the head has an entry there, as the cache says.
        merged: entries are mixtures of their groups, which stand at the groups' last tokens.
        ffn: groups around the FFNs, one for each ratio; empty where none merges.
    """

    plugin: str
    held: Tensor
    merged: bool
    ffn: tuple[FFNGroups, ...]

    @classmethod
    def of(cls, context: CompressedContext, row: int = 0) -> View:
        """Of what `context` holds; groups of its first segment, the document."""
        kept = context.kept(row)
        held = torch.zeros(len(kept), len(kept[0]), context.tokens, dtype=torch.bool)
        for layer, heads in enumerate(kept):
            for head, columns in enumerate(heads):
                held[layer, head, columns.cpu()] = True
        if context.plugin is None:
            return cls(DENSE, held, False, ())
        plan = context.model.plugin(context.plugin).plan
        layers: dict[int, list[int]] = {}
        for layer, k in plan.ratios.get("ffn", {}).items():
            layers.setdefault(k, []).append(layer)
        ffn = []
        for k, own in sorted(layers.items()):
            parts = split(context.tokens, k, plan.head, plan.tail)
            ffn.append(FFNGroups(k, parts.head, parts.groups, tuple(own)))
        merged = bool({"kv", "attention"} & plan.ratios.keys())
        return cls(context.plugin, held, merged, tuple(ffn))

    @property
    def share(self) -> float:
        """Entries held, of all tokens of all heads."""
        return float(self.held.double().mean())

    def data(self) -> dict[str, Any]:
        """As plain JSON. `held`: base64 of one bit per token, layer and head, the highest bit of a byte first."""
        layers, heads, tokens = self.held.shape
        bits = self.held.permute(2, 0, 1).reshape(-1).to(torch.uint8)
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
        packed = (
            (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)).sum(1).to(torch.uint8)
        )
        return {
            "plugin": self.plugin,
            "label": label(self.plugin),
            "layers": layers,
            "heads": heads,
            "tokens": tokens,
            "held": base64.b64encode(bytes(packed.tolist())).decode(),
            "share": self.share,
            "merged": self.merged,
            "ffn": [dataclasses.asdict(each) for each in self.ffn],
        }


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token. A character that several tokens make together is shown by the last of them."""
    shown, start = [], 0
    for end in range(1, len(ids) + 1):
        text = str(tokenizer.decode(ids[start:end]))
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            shown.append("")
            continue
        shown.append(text)
        start = end
    return shown
