"""The paper's seven tasks for lm-eval. Prompts, answers, data and SQuAD's metrics are `llm_variator.sources.tasks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from llm_variator.sources.tasks import DECODER_START, Example, exact_match, load_examples, token_f1


def documents(task: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The validation split of a task, in the order of its source.

    Args:
        task: name in `llm_variator.sources.tasks.TASKS`.
        data_dir: folder of local copies; default VARIATOR_DATA, else the hub.
    """
    examples = load_examples(task, "validation", data_dir=Path(data_dir) if data_dir else None)
    return {"validation": Dataset.from_list([_document(example) for example in examples])}


def _document(example: Example) -> dict[str, Any]:
    answers = list(example.task.answers or example.golds)
    return {
        "decoder_prompt": example.decoder_prompt,
        "t5_prompt": example.prompt,
        "answers": answers,
        "t5_answers": [f"{DECODER_START} {answer}" for answer in answers],
        "label": example.label,
        "data": f"{example.origin.name}: {example.origin.describe()}",
    }


def squad_scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match and token F1 of one generated answer, 0 to 1."""
    return {
        "exact_match": float(exact_match(results[0], doc["answers"])),
        "f1": token_f1(results[0], doc["answers"]),
    }
