"""Which shipped plugin to use, answered from stored results by rules that the page prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm_variator.report.blocks import Choice
from llm_variator.report.frontier_parts import DENSE, SHIPPED, Group, Row, answers, texts
from llm_variator.report.results import Number, Result

RULE = (
    "Keeps answers: the F1 of its answers, less two standard errors, is at most five points below the dense model's, "
    "for few questions are no proof. Of those, the fewest operations and the fewest KV entries; of all shipped "
    "plugins, the fewest operations."
)
_ERRORS, _MOST = 2, 5.0


@dataclasses.dataclass(frozen=True)
class _Candidate:
    row: Row
    answer: Row | None
    dense_answer: Row | None

    @property
    def keeps_answers(self) -> bool:
        """Known to: a plugin whose answers nobody measured is not recommended for them."""
        if self.answer is None:
            return False
        node = self.answer.node
        below, error = node["f1_above_dense"].number, node["f1_above_dense_error"].number
        return below is not None and error is not None and below - _ERRORS * error >= -_MOST

    def cost(self, key: str) -> float:
        value = self.row.node[key].number
        return float("inf") if value is None else value


def choices(results: Sequence[Result]) -> list[Choice]:
    """What to use for which need; empty where no text was read with a shipped plugin.

    All are compared on one text: the one that most shipped plugins were measured on.
    """
    groups = texts(results)
    if not groups:
        return []
    group = max(groups, key=lambda group: sum(row.kind == SHIPPED for row in group.rows))
    asked = answers(results)
    found = [_candidate(row, asked) for row in group.rows if row.kind == SHIPPED]
    keeping = [each for each in found if each.keeps_answers]
    wanted = (
        ("To read prompts faster, answers kept", keeping, "operations"),
        ("For a smaller KV cache, answers kept", keeping, "kv_entries"),
        ("Cheapest, for text that only goes on", found, "operations"),
    )
    return [
        _choice(need, min(among, key=lambda each: each.cost(key)), group)
        for need, among, key in wanted
        if among
    ]


def _candidate(row: Row, asked: Sequence[Group]) -> _Candidate:
    for group in asked:
        if (own := group.row(row.condition)) is not None:
            return _Candidate(row, own, group.row(DENSE))
    return _Candidate(row, None, None)


def _choice(need: str, candidate: _Candidate, group: Group) -> Choice:
    node, answer, dense = candidate.row.node, candidate.answer, candidate.dense_answer
    facts: list[tuple[Number | None, str]] = [
        (node["operations"].show(".3f"), "of the operations"),
        (node["kv_entries"].show(".3f"), "of the KV entries"),
        (node["above_dense"].show("+.3f"), "nats per token, ±"),
        (node["above_dense_error"].show(".3f"), ""),
    ]
    if answer is not None:
        facts.append((answer.node["f1"].show(".1f"), "F1 of answers" + (", dense" if dense else "")))
        facts.append((dense.node["f1"].show(".1f") if dense else None, ""))
    return Choice(
        need, candidate.row.condition, [(number, words) for number, words in facts if number], group.title
    )
