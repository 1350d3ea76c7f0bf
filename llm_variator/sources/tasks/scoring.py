"""Metrics of the tasks, all in percent as in the paper's Table 1, and the way from model output to labels."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

from llm_variator.errors import VariatorError
from llm_variator.sources.tasks.examples import Example
from llm_variator.sources.tasks.table import TASKS, Task, find_task

POSITIVE = 1  # the class whose F1 GLUE reports

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(
    task: Task | str, predictions: Sequence[str | int], examples: Sequence[Example]
) -> dict[str, float]:
    """The metrics named in `task.metrics`, in percent (0 to 100), unrounded.

    accuracy: share of right labels. f1 of MRPC: of the positive class, as GLUE has it. exact_match and f1 of
    SQuAD: means over the examples of `exact_match` and `token_f1`.

    Args:
        task: an entry of `TASKS`, or its name.
        predictions: one per example: a generated text, or for classification a label just as well. A text
            that is none of the task's answers (`label_from_text`) is wrong in every metric: in F1 it is a
            miss on a positive example and a false alarm on a negative one.
        examples: what was predicted, in the same order.

    Raises:
        VariatorError: no examples, or another number of predictions.
    """
    if isinstance(task, str):
        task = find_task(task)
    if not examples or len(predictions) != len(examples):
        raise VariatorError(
            f"task {task.name!r}: got {len(predictions)} predictions for {len(examples)} examples; "
            "give one for each, and at least one"
        )
    figures = (_classification if task.answers else _free_text)(task, predictions, examples)
    return {name: 100 * figures[name] for name in task.metrics}


def average(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over the seven tasks of each one's first metric, as in the paper's Table 1: of SQuAD, exact match.

    Args:
        scores: result of `score` by name of the task.

    Raises:
        VariatorError: a task is missing; an average of fewer would be compared with the paper's in error.
    """
    if missing := [name for name in TASKS if name not in scores]:
        raise VariatorError(
            f"the average is over all seven tasks; scores are missing for {', '.join(missing)}"
        )
    return sum(scores[name][task.metrics[0]] for name, task in TASKS.items()) / len(TASKS)


def label_from_text(task: Task, text: str) -> int | None:
    """The label whose answer `text` is, white space around it aside; None for anything else.

    Strict on purpose: "yes", "Yes." and "Yes, it does" are not the answer "Yes".
    """
    text = text.strip()
    return task.answers.index(text) if text in task.answers else None


def label_from_log_likelihoods(task: Task, log_likelihoods: Sequence[float]) -> int:
    """The label whose answer is the likeliest; of equally likely ones the first.

    Args:
        task: a task with labels.
        log_likelihoods: of every text of `task.answers` in that order, summed over its tokens, in nats.

    Raises:
        VariatorError: another number of values, or one that is not a number.
    """
    values = [float(value) for value in log_likelihoods]
    if len(values) != len(task.answers):
        raise VariatorError(
            f"task {task.name!r}: got {len(values)} log-likelihoods for {len(task.answers)} answers; "
            "give one for each"
        )
    if any(math.isnan(value) for value in values):
        raise VariatorError(
            f"task {task.name!r}: a log-likelihood is not a number; run the model in a wider number format"
        )
    return values.index(max(values))


def exact_match(prediction: str, golds: Sequence[str]) -> bool:
    """Whether the prediction equals one of the gold answers after normalisation (SQuAD v1.1)."""
    return normalise(prediction) in map(normalise, golds)


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Best F1, 0 to 1, over the gold answers of the words shared with each after normalisation (SQuAD v1.1).

    0 where no word is shared, so also where both sides are empty after normalisation.
    """
    return max(_overlap(normalise(prediction).split(), normalise(gold).split()) for gold in golds)


def normalise(text: str) -> str:
    """Lower case, then without ASCII punctuation, then without articles, single blanks: SQuAD v1.1's order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _overlap(predicted: Sequence[str], gold: Sequence[str]) -> float:
    shared = (Counter(predicted) & Counter(gold)).total()
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


def _free_text(task: Task, predictions: Sequence[str | int], examples: Sequence[Example]) -> dict[str, float]:
    pairs = [(str(text), example.golds) for text, example in zip(predictions, examples, strict=True)]
    return {
        "exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "f1": sum(token_f1(*pair) for pair in pairs) / len(pairs),
    }


def _classification(
    task: Task, predictions: Sequence[str | int], examples: Sequence[Example]
) -> dict[str, float]:
    labels = [
        label_from_text(task, prediction) if isinstance(prediction, str) else prediction
        for prediction in predictions
    ]
    outcomes = Counter(
        (example.label == POSITIVE, label == example.label)
        for label, example in zip(labels, examples, strict=True)
    )
    hits, misses, false_alarms = outcomes[True, True], outcomes[True, False], outcomes[False, False]
    relevant = 2 * hits + misses + false_alarms
    return {
        "accuracy": (hits + outcomes[False, True]) / len(examples),
        "f1": 2 * hits / relevant if relevant else 0.0,
    }
