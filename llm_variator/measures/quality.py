"""What is measured of a condition: the text after a prompt, answers to questions, and the time of reading.

Every figure is kept per window or question: differences to the dense model are differences of pairs.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from llm_variator.measures.conditions import Condition, Prompt, follow, greedy
from llm_variator.measures.metrics import token_nats
from llm_variator.measures.timing import Case, fair_head, interleaved, ratio
from llm_variator.model import VariatorModel


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How text goes on after prompts read in one condition; lists have one item per window."""

    nats: list[float]
    """Mean over the tokens of the true continuation (teacher forcing)."""
    greedy: list[list[int]]
    """The condition's own likeliest tokens."""
    same_choice: list[float]
    """Share of the dense model's greedy tokens that this condition would choose after those before them."""
    entries: float
    """KV entries of a prompt, summed over the layers; where heads hold unlike numbers, their mean."""
    bytes: float
    """Of those keys and values."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What is read, asked and right, as token ids."""

    prompt: list[int]
    """Read in the condition that is measured."""
    after: list[int]
    """The question where the prompt does not hold it, read densely after the prompt; else nothing."""
    gold: list[int]
    """The right answer and what ends it."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """How one condition answers; lists have one item per question."""

    tokens: list[list[int]]
    """Greedy answers."""
    nats: list[list[float]]
    """Of every token of the gold answer, given those before (teacher forcing)."""
    entries: list[float]
    """KV entries of the prompt, summed over the layers; where heads hold unlike numbers, their mean."""
    bytes: list[float]
    """Of those keys and values."""


@torch.inference_mode()
def continue_windows(
    model: VariatorModel,
    condition: Condition,
    windows: Tensor,
    context: int,
    *,
    generate: int,
    batch_size: int,
    dense: Sequence[Sequence[int]] | None = None,
) -> Continuation:
    """Read the first `context` tokens of every window, then measure what follows.

    Args:
        model: in evaluation mode.
        condition: how to read.
        windows: (rows, tokens), prompt and continuation, without padding.
        context: prompt tokens.
        generate: greedy tokens.
        batch_size: windows in one forward pass.
        dense: the dense model's greedy tokens; None: this is the dense model.
    """
    nats: list[float] = []
    texts: list[list[int]] = []
    same: list[float] = []
    entries = held = 0.0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size].to(device=model.device, dtype=torch.long)
        prompt = condition.read(model, batch[:, :context])
        entries, held = prompt.entries(), prompt.bytes()
        own = greedy(model, prompt.clone(), generate)
        reference = own
        if dense is not None:
            reference = torch.tensor(dense[start : start + batch_size], device=batch.device)
        chosen = _after(model, prompt.clone(), reference).argmax(-1)
        same += (chosen == reference).double().mean(1).tolist()
        texts += own.tolist()
        targets = batch[:, context:]
        logits = _after(model, prompt, targets)
        for row, target in zip(logits, targets, strict=True):  # fp32 logits of one row at a time
            nats.append(token_nats(row, target).mean().item())
    return Continuation(nats, texts, same, entries, held)


@torch.inference_mode()
def answer(
    model: VariatorModel,
    condition: Condition,
    questions: Sequence[Question],
    *,
    tokens: int,
    stop: frozenset[int],
) -> Answers:
    """Read every prompt once; then score its gold answer, and answer greedily.

    Args:
        model: in evaluation mode.
        condition: how to read a prompt; a question after it is dense.
        questions: to answer; a prompt that the next one shares is not read again.
        tokens: at most so many in a greedy answer.
        stop: the first of these tokens ends it, and belongs to it.
    """
    found = Answers([], [], [], [])
    for ids, group in groupby(questions, key=lambda question: question.prompt):
        asked = list(group)
        shared = condition.read(model, _row(ids, model))
        entries, held = shared.entries(), shared.bytes()
        for number, question in enumerate(asked, 1):
            prompt = shared.clone() if number < len(asked) else shared
            if question.after:
                follow(model, prompt, _row(question.after, model))
            gold = _row(question.gold, model)
            logits = _after(model, prompt.clone(), gold)[0].float()
            found.nats.append(token_nats(logits, gold[0]).tolist())
            found.tokens.append(greedy(model, prompt, tokens, stop)[0].tolist())
            found.entries.append(entries)
            found.bytes.append(held)
    return found


def _row(ids: Sequence[int], model: VariatorModel) -> Tensor:
    return torch.tensor([list(ids)], dtype=torch.long, device=model.device)


@torch.inference_mode()
def time_reading(
    model: VariatorModel,
    conditions: Sequence[Condition],
    ids: Tensor,
    repetitions: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of reading `ids` (rows, n), in turns: label -> one per repetition."""
    ids = ids.to(device=model.device, dtype=torch.long)

    def reading(condition: Condition) -> Case:
        return Case(lambda _: condition.read(model, ids).logits.argmax(-1).tolist())

    cases = {condition.label: reading(condition) for condition in conditions}
    with fair_head(model.base):
        return interleaved(cases, repetitions, device=model.device, clock=clock)


def ratio_to(dense: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of `other` over `dense`, both of the same rounds."""
    return ratio(other, dense).median


def agreement(ours: Sequence[Sequence[int]], dense: Sequence[Sequence[int]]) -> float:
    """Share of positions with the same token in two sets of texts of equal length."""
    pairs = [a == b for row in zip(ours, dense, strict=True) for a, b in zip(*row, strict=True)]
    return sum(pairs) / len(pairs)


def difference(ours: Sequence[float], dense: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the paired differences and its standard error; None for a single pair."""
    pairs = [a - b for a, b in zip(ours, dense, strict=True)]
    if len(pairs) < 2:
        return pairs[0], None
    return statistics.fmean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5


def mean_per_token(nats: Sequence[Sequence[float]]) -> float:
    """Over the tokens of all answers."""
    return statistics.fmean(token for answer in nats for token in answer)


def difference_per_token(
    ours: Sequence[Sequence[float]], dense: Sequence[Sequence[float]]
) -> tuple[float, float | None]:
    """Difference of the means over all tokens, and its standard error, where answers are what was drawn.

    Tokens of one answer hang together: the error is that of a ratio of sums over the answers, to first order. For
    answers of one length it is the error of the mean of paired differences. None for a single answer.
    """
    differences = [math.fsum(a) - math.fsum(b) for a, b in zip(ours, dense, strict=True)]
    lengths = [len(answer) for answer in dense]
    total, count = sum(lengths), len(lengths)
    mean = math.fsum(differences) / total
    if count < 2:
        return mean, None
    rest = [difference - mean * length for difference, length in zip(differences, lengths, strict=True)]
    return mean, math.sqrt(count / (count - 1) * math.fsum(r * r for r in rest)) / total


def _after(model: VariatorModel, prompt: Prompt, tokens: Tensor) -> Tensor:
    """Logits (rows, t, vocabulary) that predict `tokens` (rows, t) after `prompt`, which grows by them."""
    first = prompt.logits[:, None]
    if tokens.shape[1] == 1:
        return first
    return torch.cat((first, follow(model, prompt, tokens[:, :-1])), dim=1)
