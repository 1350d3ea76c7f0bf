"""What a server is asked under load: stretches of running text, or questions whose answers are judged."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from llm_variator.errors import VariatorError
from llm_variator.evaluate import questions
from llm_variator.measures.quality import difference
from llm_variator.sources.corpora import read_documents, tokenize
from llm_variator.sources.models import load_tokenizer
from llm_variator.sources.tasks import Example
from llm_variator.sources.tasks.scoring import exact_match, token_f1

QUESTIONS = "task:squad"
SHOTS = 3  # answered questions before each
_SPARE = 4  # questions that are looked at for each that is asked: prompts have lengths to keep


Judge = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]] | None], dict[str, Any]]
"""From answers as token ids, and the dense ones where they are known, to figures."""


@dataclass(frozen=True)
class Asked:
    """Prompts as token ids, and how answers to them are judged."""

    prompts: list[list[int]]
    judge: Judge | None = None
    """None: prompts have no right answer."""


def prompts_from(
    source: str, model: str, *, count: int, lengths: Sequence[int], seed: int, max_tokens: int
) -> Asked:
    """`count` prompts of at least `lengths[0]` and at most `lengths[-1]` tokens.

    Args:
        source: a text, as in training, or `QUESTIONS`.
        model: whose tokens they are.
        count: of prompts.
        lengths: the least and the most tokens.
        seed: of the lengths of stretches.
        max_tokens: of an answer.

    Raises:
        VariatorError: the source is not found, or too short for so many.
    """
    if source == QUESTIONS:
        return _squad(model, count, lengths, max_tokens)
    return Asked(_stretches(source, model, count, lengths, seed))


def _stretches(source: str, model: str, count: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Running text from places that are evenly spread; lengths uniform."""
    stream = torch.cat(tokenize(read_documents(source), load_tokenizer(model)))
    shortest, longest = lengths[0], lengths[-1]
    last = len(stream) - longest
    if last < count or shortest > longest:
        raise VariatorError(
            f"{count} prompts of {shortest} to {longest} tokens cannot be cut from {len(stream)}"
        )
    rng = random.Random(seed)
    starts = torch.linspace(0, last, count + 1).long().tolist()[:-1]
    return [stream[start : start + rng.randint(shortest, longest)].tolist() for start in starts]


def _squad(model: str, count: int, lengths: Sequence[int], max_tokens: int) -> Asked:
    """SQuAD's development questions behind their passages and `SHOTS` answered ones."""
    if max_tokens < questions.ANSWER_TOKENS:
        raise VariatorError(
            f"answers to {QUESTIONS} take up to {questions.ANSWER_TOKENS} tokens: raise --max-tokens {max_tokens}"
        )
    tokenizer = load_tokenizer(model)
    shots = questions.load_shots(None, SHOTS)
    examples: list[Example] = []
    prompts: list[list[int]] = []
    for example in questions.load_questions(None, _SPARE * count):
        prompt = questions.encode_question(tokenizer, example, form="text", shots=shots).prompt
        if lengths[0] <= len(prompt) <= lengths[-1] and len(prompts) < count:
            examples.append(example)
            prompts.append(prompt)
    if len(prompts) < count:
        raise VariatorError(
            f"only {len(prompts)} of {_SPARE * count} questions make prompts of {lengths[0]} to {lengths[-1]} "
            f"tokens, {count} are wanted: widen --tokens"
        )

    stops = questions.stop_tokens(tokenizer)

    def percent(of: Callable[[str, Sequence[str]], float], answers: Sequence[Sequence[int]]) -> list[float]:
        whole = [list(takewhile(lambda token: token not in stops, tokens)) for tokens in answers]
        texts = [questions.decode_answer(tokenizer, tokens) for tokens in whole]
        return [100 * of(text, example.golds) for text, example in zip(texts, examples, strict=True)]

    def judge(answers: Sequence[Sequence[int]], dense: Sequence[Sequence[int]] | None) -> dict[str, Any]:
        f1 = percent(token_f1, answers)
        figures: dict[str, Any] = {"exact_match": statistics.fmean(percent(exact_match, answers))}
        figures["f1"] = statistics.fmean(f1)
        if dense is not None:
            figures["f1_above_dense"], figures["f1_above_dense_error"] = difference(
                f1, percent(token_f1, dense)
            )
        return figures

    return Asked(prompts, judge)
