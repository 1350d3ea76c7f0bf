"""One context for later and for many: loaded by another process, and asked many questions."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_variator.bench.contexts.setting import (
    GREEDY,
    Answers,
    Figures,
    dense_prefill,
    in_another_process,
    stretches,
)
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.cache.lifecycle import stores_of
from llm_variator.engine.cache.stores import SharedStore
from llm_variator.engine.contexts import CompressedContext
from llm_variator.model import VariatorModel


@dataclass(frozen=True, kw_only=True)
class Load(Answers):
    """Save here, load and go on in another process; time of loading against a dense prefill."""

    question: PositiveInt = flag(16, "tokens of a question")
    answer_from: Path | None = flag(None, "a saved context to load and go on with", hidden=True)


@dataclass(frozen=True, kw_only=True)
class Questions(Answers):
    """Questions on one context, against as many dense prefills; memory of the context."""

    new_tokens: PositiveInt = 8
    question: PositiveInt = flag(16, "tokens of a question")
    questions: PositiveInt = flag(50, "how many")


def load(model: VariatorModel, settings: Load) -> Figures:
    """Uninterrupted, and saved and loaded by another process."""
    document, question = stretches(settings, settings.context, settings.question)
    context = model.compress(document)
    answer = model.generate(question, context=context, max_new_tokens=settings.new_tokens, **GREEDY)
    dense = dense_prefill(model, document, settings.repeats)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "context.safetensors"
        context.save(file)
        other = in_another_process(replace(settings, answer_from=file))
        size = file.stat().st_size
    return {
        "tokens": settings.context,
        "answers_equal": other["answer"] == answer.tolist(),
        "dense_prefill_seconds": dense,
        "load_seconds": other["seconds"],
        "load_over_prefill": other["seconds"] / dense,
        "file_bytes": size,
        "dense_bytes": context.report().dense_bytes,
    }


def answer_from(model: VariatorModel, settings: Load) -> Figures:
    """The other process: least seconds of loading the file, checksums compared, and the answer to the question."""
    assert settings.answer_from is not None
    _, question = stretches(settings, settings.context, settings.question)
    seconds = []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        context = CompressedContext.load(settings.answer_from, model)
        seconds.append(time.perf_counter() - start)
    answer = model.generate(question, context=context, max_new_tokens=settings.new_tokens, **GREEDY)
    return {"seconds": min(seconds), "answer": answer.tolist()}


def questions(model: VariatorModel, settings: Questions) -> Figures:
    """One compression and all answers, one after the other and in one batch; dense prefills beside it."""
    document, *asked = stretches(settings, settings.context, *[settings.question] * settings.questions)
    options = dict(max_new_tokens=settings.new_tokens, **GREEDY)
    dense = dense_prefill(model, document, settings.repeats)
    start = time.perf_counter()
    context = model.compress(document)
    answers, forks = [], []
    for question in asked:
        answer, after = model.generate(question, context=context, return_context=True, **options)
        answers.append(answer)
        forks.append(after)
    apart = time.perf_counter() - start
    start = time.perf_counter()
    together = model.generate(torch.cat(asked), context=model.compress(document), **options)
    batch = time.perf_counter() - start
    stores = [stores_of(layer)[:1] for fork in forks for layer in fork.cache.layers]
    firsts: list[Any] = [
        store.parts[0][0] for own in stores for store in own if isinstance(store, SharedStore)
    ]
    shared = {keys.data_ptr() for keys in firsts if isinstance(keys, Tensor)}
    report = context.report()
    return {
        "tokens": settings.context,
        "questions": settings.questions,
        "new_tokens": settings.new_tokens,
        "dense_prefill_seconds": dense,
        "seconds_one_by_one": apart,
        "seconds_one_batch": batch,
        "one_by_one_over_dense_prefills": apart / (settings.questions * dense),
        "one_batch_over_dense_prefills": batch / (settings.questions * dense),
        "batch_equals_one_by_one": bool(torch.equal(together, torch.cat(answers))),
        "copies_of_the_context": len(shared) / len(report.layers),
        "context_bytes": report.bytes,
        "all_sessions_bytes": report.bytes
        + sum(each.bytes - each.shared_bytes for each in (fork.report() for fork in forks)),
        "dense_bytes_of_all_sessions": sum(fork.report().dense_bytes for fork in forks),
    }
