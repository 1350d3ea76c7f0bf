"""Answers side by side: what each condition has said so far, and what that took. Knows no page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from llm_variator.measures.compare import DENSE, Comparison, common_prefix
from llm_variator.measures.conditions import Dense, WithPlugin
from llm_variator.measures.operations import Stack
from llm_variator.model import VariatorModel


@dataclasses.dataclass(frozen=True)
class Panel:
    """One condition's answer; numbers are None as long as nobody knows them.

    Attributes:
        plugin: its name, or `DENSE`.
        same: text up to where it parts from the dense one.
        parted: the rest.
        same_tokens: tokens before they part.
        first_token_seconds: from the question, or from the whole prompt, to the first token.
        first_token_ratio: of the dense model's.
        read_seconds: of the document, once.
        tokens_per_second: after the first.
        kv_bytes: of the document's cache, or of the whole prompt's.
        kv_ratio: of the dense model's.
        operations: of reading the same, by arithmetic, of the dense model's.
        cross_entropy: nats per token of the dense answer.
        state: what it is doing.
    """

    plugin: str
    same: str = ""
    parted: str = ""
    same_tokens: int | None = None
    first_token_seconds: float | None = None
    first_token_ratio: float | None = None
    read_seconds: float | None = None
    tokens_per_second: float | None = None
    kv_bytes: int | None = None
    kv_ratio: float | None = None
    operations: float | None = None
    cross_entropy: float | None = None
    state: str = ""

    @property
    def label(self) -> str:
        """How the page calls it."""
        return label(self.plugin)


def label(plugin: str | None) -> str:
    """How the page calls a plugin, or the dense model (None or `DENSE`)."""
    return "dense" if plugin in (None, DENSE) else str(plugin)


def operations(model: VariatorModel, plugin: str | None, tokens: int) -> float:
    """Operations of reading so many tokens, of the dense model's."""
    stack = Stack.of(model.config)
    condition = Dense() if plugin is None else WithPlugin(plugin, plugin, model.plugins[plugin])
    return condition.cost(stack, tokens).total / Dense().cost(stack, tokens).total


def parted(tokenizer: Any, ours: Sequence[int], dense: Sequence[int] | None) -> tuple[str, str, int | None]:
    """Our text in two parts, up to and from the first token that is not the dense one's; and that token's place."""
    decode = tokenizer.decode
    whole = str(decode(ours, skip_special_tokens=True))
    if dense is None:
        return whole, "", None
    place = common_prefix(ours, dense)
    same = str(decode(ours[:place], skip_special_tokens=True))
    if not whole.startswith(same):  # a character that both begin
        same = same.rstrip("\ufffd")
    return same, whole[len(same) :], place


def of_comparison(
    model: VariatorModel, tokenizer: Any, rows: Sequence[Comparison], prompt_tokens: int
) -> list[Panel]:
    """The rows of `--compare` as panels."""
    found = []
    for row in rows:
        same, rest, place = parted(tokenizer, row.tokens, rows[0].tokens)
        found.append(
            Panel(
                plugin=row.plugin,
                same=same,
                parted=rest,
                same_tokens=place,
                first_token_seconds=row.first_token_seconds,
                first_token_ratio=row.first_token_ratio,
                tokens_per_second=row.tokens_per_second,
                kv_bytes=row.kv_bytes,
                kv_ratio=row.kv_ratio,
                operations=operations(model, None if row.plugin == DENSE else row.plugin, prompt_tokens),
                cross_entropy=row.cross_entropy,
            )
        )
    return found
