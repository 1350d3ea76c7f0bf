"""Perplexity of a text's continuation after a compressed context, in fixed windows, for lm-eval.

A window is a stretch of text of fixed size, from one word's beginning on: its first part is the context (given, and
compressed), the rest the continuation (scored, dense). Windows never overlap. Sizes are in characters and figures
per byte and word, so that models with different tokenizers can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from llm_variator.sources.corpora import read_documents

CONTEXT, CONTINUATION = 2_000, 500
"""Characters: 400 to 500 tokens of context and about 120 of continuation, with most tokenizers and English."""
WINDOWS = 64


def documents(source: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """Windows evenly spread over a source of text.

    Args:
        source: as `llm_variator.sources.corpora` names them.
        data_dir: folder of local copies; default VARIATOR_DATA.
    """
    text = "\n\n".join(read_documents(source, Path(data_dir) if data_dir else None))
    size = CONTEXT + CONTINUATION
    count = min(WINDOWS, len(text) // (2 * size))
    windows = [_window(text, place * len(text) // count) for place in range(count)]
    return {"test": Dataset.from_list(windows)}


def _window(text: str, start: int) -> dict[str, str]:
    """Context and continuation, both ending with a word; the blank between them belongs to the continuation."""
    start = _next_blank(text, start) + 1
    middle = _next_blank(text, start + CONTEXT)
    end = _next_blank(text, middle + CONTINUATION)
    context = text[start:middle].rstrip()
    return {"context": context, "continuation": text[start + len(context) : end]}


def _next_blank(text: str, place: int) -> int:
    return next((i for i in range(place, len(text)) if text[i].isspace()), len(text))


def scores(doc: Mapping[str, str], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """The log-likelihood of one continuation with its number of bytes and words."""
    log_likelihood, text = results[0][0], doc["continuation"]
    return {
        "bits_per_byte": (log_likelihood, len(text.encode())),
        "word_perplexity": (log_likelihood, len(text.split())),
    }
