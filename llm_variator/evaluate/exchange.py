"""Windows and questions as a file for another environment, and what was measured there.

kvpress needs a release of transformers that this library does not support: `eval/kvpress_presses.py` runs in an
environment of its own and knows nothing but these files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.evaluate.questions import ANSWER_TOKENS
from llm_variator.measures.quality import Answers, Continuation, Question
from llm_variator.measures.store import digest
from llm_variator.model import VariatorModel


class _Text(Protocol):
    @property
    def data(self) -> str: ...
    @property
    def context(self) -> int: ...
    @property
    def windows(self) -> Tensor: ...


class _Quiz(Protocol):
    @property
    def asked(self) -> dict[str, list[Question]]: ...
    @property
    def stop(self) -> frozenset[int]: ...


@dataclasses.dataclass(frozen=True)
class ExternalResult:
    """A condition that was measured by another program."""

    label: str
    texts: list[Continuation]
    """One per set of windows."""
    answers: dict[str, Answers]
    """By the place of the question; empty without questions."""


def export(
    path: Path,
    model: VariatorModel,
    texts: Sequence[_Text],
    quiz: _Quiz | None,
    measured: Sequence[Mapping[str, Continuation]],
    generate: int,
) -> None:
    """Write everything that another environment needs to measure the same; the first condition is the dense one."""
    tasks = _tasks(model, texts, quiz, generate)
    dense = [next(iter(found.values())) for found in measured]
    content = {
        "digest": digest(tasks),
        **tasks,
        "dense": [dataclasses.asdict(one) for one in dense],
    }
    write_atomically(path, json.dumps(content) + "\n")


def read_external(
    path: Path, model: VariatorModel, texts: Sequence[_Text], quiz: _Quiz | None, generate: int
) -> list[ExternalResult]:
    """What was measured elsewhere on the same model, windows and questions.

    Raises:
        VariatorError: the file cannot be read, or its figures belong to other tokens.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = [
            ExternalResult(
                one["label"],
                [Continuation(**text) for text in one["texts"]],
                {place: Answers(**answers) for place, answers in one["answers"].items()},
            )
            for one in content["conditions"]
        ]
        theirs = content["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VariatorError(f"{path} is not a file of measurements ({error}); measure again") from None
    if theirs != digest(_tasks(model, texts, quiz, generate)):
        raise VariatorError(
            f"{path} was measured on other windows or questions: --export again with these flags, and measure again"
        )
    places = quiz.asked.keys() if quiz else ()
    if any(len(one.texts) < len(texts) or not one.answers.keys() >= set(places) for one in found):
        raise VariatorError(f"{path} is of a run that was stopped: run it again, it goes on where it was")
    return found


def _tasks(model: VariatorModel, texts: Sequence[_Text], quiz: _Quiz | None, generate: int) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(model.signature),
        "generate": generate,
        "texts": [
            {"data": text.data, "context": text.context, "windows": text.windows.tolist()} for text in texts
        ],
        "questions": {
            "asked": {
                place: [dataclasses.asdict(question) for question in asked]
                for place, asked in (quiz.asked if quiz else {}).items()
            },
            "stop": sorted(quiz.stop) if quiz else [],
            "tokens": ANSWER_TOKENS,
        },
    }
