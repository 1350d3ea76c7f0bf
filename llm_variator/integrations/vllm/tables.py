"""How heads share block tables. vLLM gives every table equally many heads and fills up the last one of each class.

vLLM takes the smallest class for the size of all tables. Where that fills up much, another size is reached by making a
class of that size out of a part of a larger one. Knows integers, not vLLM.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import NamedTuple, TypeVar

from llm_variator.engine.plan import Plan
from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.heads import Keep, entries_of
from llm_variator.integrations.vllm.plan import Shape

WASTE = 1 / 8
"""Of the memory of a typical prompt, what fewer tables may cost: every step plans each of them."""

K = TypeVar("K", bound=Hashable)


class Kind(NamedTuple):
    """Heads of which equally many entries are held, whatever plugin a request uses."""

    ratios: tuple[tuple[Ratio, int], ...] = ()
    """(what a plugin is served under, tokens of an entry), where it merges tokens in front of them."""
    keeps: tuple[tuple[Ratio, Keep], ...] = ()
    """(what a plugin is served under, how it reduces a prompt), where it keeps keys and values."""


class Tables(NamedTuple):
    """How heads are cut into tables."""

    size: int
    """Heads of every table."""
    number: int
    """Of tables."""
    parted: Hashable = None
    """The class whose first `size` heads become a class of their own; None: as vLLM would anyway."""


def kind_of(plans: Mapping[Ratio, Plan], layer: int, head: int) -> Kind:
    """What the plugins do to one KV head."""
    ratios = ((k, plan.ratios.get("kv", {}).get(layer)) for k, plan in plans.items())
    keeps = ((k, plan, plan.selected[layer][head]) for k, plan in plans.items() if layer in plan.selected)
    return Kind(
        tuple((k, ratio) for k, ratio in ratios if ratio is not None),
        tuple((k, Keep(ratio, plan.config.block)) for k, plan, ratio in keeps),
    )


def own_tables(counts: Collection[int]) -> Tables:
    """What vLLM makes of classes of so many."""
    least, most = min(counts), max(counts)
    size = most if most < 1.5 * least else least
    return Tables(size, sum(-(-count // size) for count in counts))


def cut(classes: Mapping[K, int], entries: Mapping[K, float], waste: float = WASTE) -> Tables:
    """Few tables that hold little besides entries.

    Args:
        classes: heads of every class.
        entries: that a head holds of a typical prompt.
        waste: memory of empty places that fewer tables may cost, as a share.
    """

    def held(size: int) -> float:
        return sum(-(-count // size) * size * entries[kind] for kind, count in classes.items())

    options = [own_tables(classes.values()), *_parted(classes)]
    exact = sum(count * entries[kind] for kind, count in classes.items())
    near = [option for option in options if held(option.size) <= (1 + waste) * exact]
    if near:
        return min(near, key=lambda option: option.number)
    return min(options, key=lambda option: held(option.size))


def _parted(classes: Mapping[K, int]) -> Iterator[Tables]:
    for size in range(1, max(classes.values()) // 2 + 1):
        for kind, count in classes.items():
            if count < 2 * size:
                continue
            others = [heads for other, heads in classes.items() if other != kind]
            found = own_tables([*others, size, count - size])
            if found.size == size:
                yield found._replace(parted=kind)
                break


def cut_heads(
    plans: Mapping[Ratio, Plan], shapes: Mapping[Ratio, Shape], layers: int, kv_heads: int, prompt: int
) -> tuple[Tables, frozenset[tuple[int, int]]]:
    """The tables of a model whose heads are layers of their own, for prompts of so many tokens.

    Returns:
        They, and the (layer, head) that are made a class of their own.
    """
    kinds = {
        (layer, head): kind_of(plans, layer, head) for layer in range(layers) for head in range(kv_heads)
    }
    entries = {
        kind: statistics.mean(
            entries_of(prompt, prompt, k, shapes[k], dict(kind.ratios), dict(kind.keeps)) for k in plans
        )
        for kind in set(kinds.values())
    }
    found = cut(Counter(kinds.values()), entries)
    own = [place for place, kind in kinds.items() if kind == found.parted]
    return found, frozenset(own[: found.size])
