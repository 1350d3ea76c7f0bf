"""From measurements to the rows of the frontier's tables."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence

from llm_variator.measures.operations import Cost
from llm_variator.measures.quality import (
    Answers,
    Continuation,
    agreement,
    difference,
    difference_per_token,
    mean_per_token,
    ratio_to,
)
from llm_variator.sources.tasks import Example, score
from llm_variator.sources.tasks.scoring import token_f1


@dataclasses.dataclass(frozen=True)
class TextRow:
    """One condition on one set of windows; shares are of the dense model's."""

    condition: str
    cross_entropy: float
    """Nats per token of the true continuation."""
    above_dense: float
    above_dense_error: float | None
    """Standard error of the mean difference, over the windows."""
    greedy_agreement: float
    """Share of greedy tokens equal to the dense model's at the same place."""
    same_choice: float
    """Share of the dense model's greedy tokens chosen here too, given those before."""
    operations: float
    """Share of the operations of reading the prompt, the plugin's own among them."""
    ffn_operations: float
    """Share of the FFNs' operations, counting all of the plugin's own against it."""
    kv_entries: float
    """Share of the prompt's KV entries, counted in the cache."""
    kv_bytes: float
    """Share of their bytes."""
    prefill: float | None
    """Measured time of reading the prompt, by the dense model's: median over rounds of the ratio."""
    prefill_seconds: float | None
    """Median."""


@dataclasses.dataclass(frozen=True)
class AnswerRow:
    """One condition on SQuAD's questions; F1 and shares of answers in percent."""

    condition: str
    exact_match: float
    f1: float
    f1_above_dense: float
    f1_above_dense_error: float | None
    same_answer: float
    """Share of answers equal to the dense model's."""
    gold_nats: float
    """Nats per token of the gold answers, given the tokens before."""
    gold_above_dense: float
    gold_above_dense_error: float | None
    """Standard error of that difference, over the questions."""
    kv_entries: float
    """Share of the prompts' KV entries, of 1."""
    kv_bytes: float
    """Share of their bytes, of 1."""


@dataclasses.dataclass(frozen=True)
class PairRow:
    """A plugin less a condition measured elsewhere that holds about as many bytes: below 0 the plugin is better."""

    condition: str
    other: str
    nats: float
    """Mean of the paired differences per token, of true continuations or gold answers."""
    nats_error: float | None
    """Its standard error, over windows or questions."""
    kv_bytes: float
    """Share of the dense model's bytes, of 1."""
    other_kv_bytes: float


EQUAL = 0.1
"""Conditions whose bytes differ by no more than this share of them are compared with each other."""


def pair_rows(
    ours: Mapping[str, Continuation | Answers],
    theirs: Mapping[str, Continuation | Answers],
    dense: Continuation | Answers,
) -> list[PairRow]:
    """Every one of `ours` less every one of `theirs` that holds about as many bytes, on the same tokens."""
    rows = []
    whole = _bytes(dense)
    for (label, one), (other, two) in itertools.product(ours.items(), theirs.items()):
        if abs(_bytes(one) - _bytes(two)) <= EQUAL * _bytes(one):
            nats, error = difference_per_token(_nats(one), _nats(two))
            rows.append(PairRow(label, other, nats, error, _bytes(one) / whole, _bytes(two) / whole))
    return rows


def _bytes(found: Continuation | Answers) -> float:
    return sum(found.bytes) if isinstance(found, Answers) else found.bytes


def _nats(found: Continuation | Answers) -> list[list[float]]:
    """By window or question; of a window only the mean is known."""
    return found.nats if isinstance(found, Answers) else [[mean] for mean in found.nats]


def text_row(
    label: str,
    found: Continuation,
    dense: Continuation,
    cost: Cost,
    dense_cost: Cost,
    seconds: Sequence[float] | None = None,
    dense_seconds: Sequence[float] | None = None,
) -> TextRow:
    """The row of a condition from what was measured of it and of the dense model; seconds are of the same rounds."""
    above, error = difference(found.nats, dense.nats)
    return TextRow(
        condition=label,
        cross_entropy=statistics.fmean(found.nats),
        above_dense=above,
        above_dense_error=error,
        greedy_agreement=agreement(found.greedy, dense.greedy),
        same_choice=statistics.fmean(found.same_choice),
        operations=cost.total / dense_cost.total,
        ffn_operations=(cost.ffn + cost.plugin) / dense_cost.ffn,
        kv_entries=found.entries / dense.entries,
        kv_bytes=found.bytes / dense.bytes,
        prefill=ratio_to(dense_seconds, seconds) if seconds and dense_seconds else None,
        prefill_seconds=statistics.median(seconds) if seconds else None,
    )


def answer_row(
    label: str,
    examples: Sequence[Example],
    found: Answers,
    dense: Answers,
    decode: Callable[[Sequence[int]], str],
) -> AnswerRow:
    """The row of a condition from its answers and the dense model's."""
    answers, reference = ([decode(tokens) for tokens in one.tokens] for one in (found, dense))
    figures = score("squad", answers, examples)
    ours, theirs = (
        [100 * token_f1(text, example.golds) for text, example in zip(texts, examples, strict=True)]
        for texts in (answers, reference)
    )
    above, error = difference(ours, theirs)
    gold_above, gold_error = difference_per_token(found.nats, dense.nats)
    return AnswerRow(
        condition=label,
        exact_match=figures["exact_match"],
        f1=figures["f1"],
        f1_above_dense=above,
        f1_above_dense_error=error,
        same_answer=100 * statistics.fmean(a == b for a, b in zip(answers, reference, strict=True)),
        gold_nats=mean_per_token(found.nats),
        gold_above_dense=gold_above,
        gold_above_dense_error=gold_error,
        kv_entries=sum(found.entries) / sum(dense.entries),
        kv_bytes=sum(found.bytes) / sum(dense.bytes),
    )
