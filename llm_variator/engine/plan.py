"""A configuration resolved for one base: which layers are compressed at which ratio, which tokens stay dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llm_variator.config import BaseSignature, VariatorConfig
from llm_variator.errors import VariatorError

Ratios = Mapping[str, Mapping[int, int]]  # site -> layer -> k


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a plugin does to a prompt of its base."""

    config: VariatorConfig
    """With every default filled in."""
    ratios: Ratios
    head: int
    """First tokens of a sequence that stay dense."""
    tail: int
    """Least number of last prompt tokens that stay dense."""
    selected: Mapping[int, tuple[int, ...]]
    """layer -> ratio of each KV head, where site "kv" keeps keys and values instead of merging tokens."""

    @classmethod
    def of(
        cls,
        config: VariatorConfig,
        base: BaseSignature,
        *,
        decoder: bool,
        slides: Callable[[int], bool],
        kv_heads: int,
    ) -> Plan:
        """Resolve `config` for `base`, whose attention has `kv_heads` heads of keys and values.

        Layers that attend through a sliding window (`slides`) keep their attention dense: their cache is short.

        Raises:
            VariatorError: the two do not fit together, or a site has no layer left.
        """
        config = config.resolved(base, decoder=decoder)
        if config.k_per_head is not None and len(config.k_per_head[0]) != kv_heads:
            raise VariatorError(
                f"k_per_head has {len(config.k_per_head[0])} ratios per layer, but {base.name!r} has {kv_heads} KV "
                "heads"
            )
        selected = {
            layer: heads
            for layer in range(base.num_layers)
            if (heads := config.head_ratios(layer, kv_heads)) is not None and not slides(layer)
        }
        ratios: dict[str, dict[int, int]] = {}
        for site in config.sites:
            if site == "kv" and selected:
                continue
            ratios[site] = {
                layer: k
                for layer in range(base.num_layers)
                if (k := config.ratio(site, layer)) is not None
                and (site in ("ffn", "cross") or not slides(layer))
            }
            if not ratios[site]:
                raise VariatorError(
                    f"site {site!r} has no layer left in {base.name!r}: `layers` and the ratios leave "
                    "all dense, or every layer has a sliding window (whose attention is not compressed)"
                )
        head, tail = config.ends
        return cls(config, ratios, head, tail, selected)


def kv_heads(config: Any) -> int:
    """Heads of keys and values in the attention of a model with this Hugging Face configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads)
