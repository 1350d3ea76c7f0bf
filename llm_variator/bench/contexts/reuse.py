"""One context for later and for many: loaded by another process, and asked many questions."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from llm_variator.bench.contexts.setting import (
    GREEDY,
    Figures,
    compressed_layers,
    dense_prefill,
    in_another_process,
    stretches,
)
from llm_variator.engine.cache.stores import SharedStore
from llm_variator.engine.contexts import CompressedContext
from llm_variator.model import VariatorModel


def load(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """Uninterrupted, and saved and loaded by another process."""
    document, question = stretches(args, args.context, args.question)
    context = model.compress(document)
    answer = model.generate(question, context=context, max_new_tokens=args.new_tokens, **GREEDY)
    dense = dense_prefill(model, document, args.repeats)
    sizes = dict(
        context=args.context, question=args.question, new_tokens=args.new_tokens, repeats=args.repeats
    )
    flags = [word for name, value in sizes.items() for word in (f"--{name.replace('_', '-')}", value)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "context.safetensors"
        context.save(file)
        other = in_another_process(args, *flags, "--answer-from", file)
        size = file.stat().st_size
    return {
        "tokens": args.context,
        "answers_equal": other["answer"] == answer.tolist(),
        "dense_prefill_seconds": dense,
        "load_seconds": other["seconds"],
        "load_over_prefill": other["seconds"] / dense,
        "file_bytes": size,
        "dense_bytes": context.report().dense_bytes,
    }


def answer_from(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """The other process: least seconds of loading the file, checksums compared, and the answer to the question."""
    _, question = stretches(args, args.context, args.question)
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        context = CompressedContext.load(args.answer_from, model)
        seconds.append(time.perf_counter() - start)
    answer = model.generate(question, context=context, max_new_tokens=args.new_tokens, **GREEDY)
    return {"seconds": min(seconds), "answer": answer.tolist()}


def questions(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """One compression and all answers, one after the other and in one batch; dense prefills beside it."""
    document, *asked = stretches(args, args.context, *[args.question] * args.questions)
    options = dict(max_new_tokens=args.new_tokens, **GREEDY)
    dense = dense_prefill(model, document, args.repeats)
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
    stores = [layer.store for fork in forks for layer in compressed_layers(fork)]
    firsts = [store.parts[0][0] for store in stores if isinstance(store, SharedStore)]
    shared = {keys.data_ptr() for keys in firsts if isinstance(keys, Tensor)}
    report = context.report()
    return {
        "tokens": args.context,
        "questions": args.questions,
        "new_tokens": args.new_tokens,
        "dense_prefill_seconds": dense,
        "seconds_one_by_one": apart,
        "seconds_one_batch": batch,
        "one_by_one_over_dense_prefills": apart / (args.questions * dense),
        "one_batch_over_dense_prefills": batch / (args.questions * dense),
        "batch_equals_one_by_one": bool(torch.equal(together, torch.cat(answers))),
        "copies_of_the_context": len(shared) / len(report.layers),
        "context_bytes": report.bytes,
        "all_sessions_bytes": report.bytes
        + sum(each.bytes - each.shared_bytes for each in (fork.report() for fork in forks)),
        "dense_bytes_of_all_sessions": sum(fork.report().dense_bytes for fork in forks),
    }
