"""A configuration resolved for one base: which layers are compressed at which ratio, which tokens stay dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

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

    @classmethod
    def of(
        cls, config: VariatorConfig, base: BaseSignature, *, decoder: bool, slides: Callable[[int], bool]
    ) -> Plan:
        """Resolve `config` for `base`.

        Layers that attend through a sliding window (`slides`) keep their attention dense: their cache is short.

        Raises:
            VariatorError: the two do not fit together, or a site has no layer left.
        """
        config = config.resolved(base, decoder=decoder)
        ratios: dict[str, dict[int, int]] = {}
        for site in config.sites:
            ratios[site] = {
                layer: k
                for layer in range(base.num_layers)
                if (k := config.ratio(site, layer)) is not None
                and (site in ("ffn", "cross") or not slides(layer))
            }
            if not ratios[site]:
                raise VariatorError(
                    f"site {site!r} has no layer left in {base.name!r}: `layers` or `k_per_layer` leave "
                    "all dense, or every layer has a sliding window (whose attention is not compressed)"
                )
        head, tail = config.ends
        return cls(config, ratios, head, tail)
