"""From documents and tasks to training examples: the held-out split and the streams the trainer reads.

Everything here is a pure function of its arguments and the seed: example number i of a run is the same
whether the run was interrupted or not.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import (
    END,
    TASK,
    Source,
    cut_windows,
    end_windows,
    read_documents,
    read_windows,
    repeat_passages,
    spread,
    tokenize,
)
from llm_variator.sources.tasks.examples import Example, load_examples

# Which documents are held out does not depend on the run's seed, so that figures of different seeds compare.
_SPLIT_SEED = 20231208
_HELD_OUT_SHARE = 0.1
_CHARACTERS_PER_TOKEN = 8  # no more, so that what is set aside for tokens is enough
_BLANK_LINES = re.compile(r"\n\s*\n")
_SHOTS = 8  # examples of a task in one document, as in a prompt with examples
_BATCHES_IN_A_POOL = 32  # within which examples are sorted by length


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token windows for training and for validation; the two share no document."""

    train: tuple[Tensor, ...]
    """One int32 tensor (windows, seq_length) per source."""
    weights: tuple[float, ...]
    """How many times each source is drawn per pass."""
    held_out: Tensor
    """int32 (windows, seq_length)."""


def build_corpus(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_length: int,
    eval_windows: int,
    eval_sources: Sequence[Source] = (),
    data_dir: Path | None = None,
) -> Corpus:
    """Read and tokenise the sources and cut them into windows of `seq_length` tokens.

    Without `eval_sources`, documents with at most a tenth of each source's tokens are held out, enough for
    an equal share of `eval_windows` where the source is large enough: of a task other passages than those trained on,
    of plain text, as far as there are such, documents of which little stands in others.

    Raises:
        VariatorError: a source cannot be read, or is too short for one training and one held-out window.
    """
    train, held_out = [], []
    share = -(-eval_windows // len(eval_sources or sources))
    for source in sources:
        at_end, name = source.name.startswith(END), source.name.removeprefix(END)
        tokens = 0 if eval_sources else share * seq_length
        texts, apart = _read(name, data_dir, tokens)
        documents = tokenize(texts, tokenizer)
        cut = partial(end_windows if at_end else cut_windows, seq_length=seq_length, tokenizer=tokenizer)
        rest = documents
        if not eval_sources:
            if apart and name.startswith(TASK):
                rest, held = documents[: apart[0]], documents[apart[0] :]
            else:
                rest, held = hold_out(documents, tokens, apart)
            held_out.append(cut(held)[:share])
        train.append(cut(rest))
        if not len(train[-1]):
            if at_end:
                raise VariatorError(
                    f"data {source.name!r}: no document has the {seq_length} tokens of a window: give longer ones or a "
                    "smaller --seq-length"
                )
            total = sum(map(len, documents))
            raise VariatorError(
                f"data {source.name!r} has {total} tokens, too few to train on windows of {seq_length} "
                f"tokens: give more text or a smaller --seq-length"
            )
    for source in eval_sources:
        windows = read_windows(source.name, tokenizer, seq_length=seq_length, data_dir=data_dir)
        held_out.append(spread(windows, share))
    validation = torch.cat(held_out)[:eval_windows]
    if not len(validation):
        raise VariatorError(
            f"too little text to hold out one window of {seq_length} tokens (a tenth at most is held "
            f"out): give more text, --eval-data, or a smaller --seq-length"
        )
    return Corpus(tuple(train), tuple(source.weight for source in sources), validation)


def _read(source: str, data_dir: Path | None, held_out: int) -> tuple[list[str], Sequence[int]]:
    """The documents of a source, and the numbers of those to hold out first, where so many tokens are to be.

    Of `task:NAME` they are a task's training examples with their answers, several in a document; the last documents
    are to be held out, all of them: no passage in them stands in another.
    """
    if not source.startswith(TASK):
        documents = read_documents(source, data_dir)
        return documents, _apart(documents) if held_out else ()
    examples = list(load_examples(source.removeprefix(TASK), "train", data_dir=data_dir))
    random.Random(_SPLIT_SEED).shuffle(examples)  # neighbours often share their passage
    passages = list(dict.fromkeys(_passage(example) for example in examples))
    sizes: Counter[str] = Counter()
    for example in examples:
        sizes[_passage(example)] += example.size
    most = min(held_out * _CHARACTERS_PER_TOKEN, _HELD_OUT_SHARE * sizes.total())
    reached = list(itertools.accumulate(sizes[passage] for passage in passages))
    aside = set(passages[: bisect.bisect(reached, most)])
    parts: list[list[str]] = [[], []]
    for example in examples:
        parts[_passage(example) in aside].append(example.decoder_prompt + example.continuation)
    packed = [
        ["\n\n".join(part[start : start + _SHOTS]) for start in range(0, len(part), _SHOTS)] for part in parts
    ]
    return packed[0] + packed[1], range(len(packed[0]), len(packed[0]) + len(packed[1]))


def _passage(example: Example) -> str:
    return max(example.inputs.values(), key=len)


def _apart(documents: Sequence[str]) -> list[int]:
    """The documents of which less than a tenth stands, by paragraphs, in another one too."""
    paragraphs = [
        {" ".join(part.split()) for part in _BLANK_LINES.split(document)} - {""} for document in documents
    ]
    found = Counter(itertools.chain.from_iterable(map(hash, part) for part in paragraphs))
    shared = [sum(len(one) for one in part if found[hash(one)] > 1) for part in paragraphs]
    sizes = [sum(map(len, part)) for part in paragraphs]
    return [i for i, (one, size) in enumerate(zip(shared, sizes, strict=True)) if one < 0.1 * size]


def hold_out(
    documents: Sequence[Tensor], tokens: int, first: Sequence[int] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Split documents into (training, held out), the latter chosen at random until it has `tokens` tokens.

    Those numbered `first` are chosen before others. At most a tenth of all tokens is held out, none where every
    document is larger than that.
    """
    room = int(_HELD_OUT_SHARE * sum(map(len, documents)))
    chosen: set[int] = set()
    held, preferred = 0, set(first)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(documents)).tolist()
    for index in sorted(order, key=lambda index: index not in preferred):
        if held < tokens and held + len(documents[index]) <= room:
            chosen.add(index)
            held += len(documents[index])
    return (
        [document for index, document in enumerate(documents) if index not in chosen],
        [document for index, document in enumerate(documents) if index in chosen],
    )


class TrainingStream(Dataset[dict[str, Any]]):
    """The examples of a whole run in the order they are trained on, read without shuffling.

    Example i is window number i of an endless sequence of passes, each in an order of its own. All examples
    of a micro-batch have the same prompt length, so that they are compressed by slices instead of gathers.
    Both are drawn from (seed, pass) and (seed, micro-batch) alone: a resumed run reads exactly what the
    interrupted one would have.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        length: int,
        batch_size: int,
        prompt_tokens: tuple[int, int],
        seed: int,
        recall: float = 0.0,
    ) -> None:
        """`length` examples in micro-batches of `batch_size`, with (least, most) `prompt_tokens`.

        A share `recall` of them goes on with passages of its prompt (`repeat_passages`).
        """
        self._windows = torch.cat(corpus.train)
        self._parts = [(len(part), weight) for part, weight in zip(corpus.train, corpus.weights, strict=True)]
        self._length = length
        self._batch_size = batch_size
        self._prompt_tokens = prompt_tokens
        self._seed = seed
        self._recall = recall
        self._pass_length = sum(_drawn(*part) for part in self._parts)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`: int64 (seq_length,); `prompt_length`: int."""
        number, place = divmod(index, self._pass_length)
        least, most = self._prompt_tokens
        draw = np.random.default_rng((self._seed, 1, index // self._batch_size))
        prompt = int(draw.integers(least, most, endpoint=True))
        window = self._windows[self._order(number)[place]].long()
        draw = np.random.default_rng((self._seed, 4, index))
        if draw.random() < self._recall:
            window = repeat_passages(window, prompt, draw)
        return {"input_ids": window, "prompt_length": prompt}

    def _draw_order(self, number: int) -> np.ndarray:
        draw = np.random.default_rng((self._seed, 0, number))
        order, start = [], 0
        for windows, weight in self._parts:
            count = _drawn(windows, weight)
            passes = [draw.permutation(windows) for _ in range(-(-count // windows))]
            order.append(start + np.concatenate(passes)[:count])
            start += windows
        return draw.permutation(np.concatenate(order))


def _drawn(windows: int, weight: float) -> int:
    return max(1, round(windows * weight))


def collate(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A micro-batch: `input_ids` int64 (rows, seq_length), `prompt_length` of its rows."""
    lengths = {example["prompt_length"] for example in examples}
    assert len(lengths) == 1, "the rows of a micro-batch share their prompt length"
    return {
        "input_ids": torch.stack([example["input_ids"] for example in examples]),
        "prompt_length": lengths.pop(),
    }


class ExampleStream(Dataset[Example]):
    """The task examples of a whole run in the order they are trained on, read without shuffling.

    Each pass has an order of its own, drawn from (seed, pass) alone. The rows of a micro-batch are of similar
    length, so that little of it is padding; examples that fill no micro-batch wait for another pass.
    """

    def __init__(self, examples: Sequence[Example], *, length: int, batch_size: int, seed: int) -> None:
        """`length` examples in micro-batches of `batch_size`."""
        self._examples = examples
        self._sizes = np.array([example.size for example in examples])
        self._length = length
        self._batch_size = batch_size
        self._seed = seed
        self._pass_length = len(examples) // batch_size * batch_size or len(examples)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        number, place = divmod(index, self._pass_length)
        return self._examples[self._order(number)[place]]

    def _draw_order(self, number: int) -> np.ndarray:
        draw = np.random.default_rng((self._seed, 3, number))
        order = draw.permutation(len(self._examples))[: self._pass_length]
        if self._pass_length < self._batch_size:
            return order
        pool = _BATCHES_IN_A_POOL * self._batch_size
        pools = [order[start : start + pool] for start in range(0, len(order), pool)]
        by_length = np.concatenate([part[np.argsort(self._sizes[part], kind="stable")] for part in pools])
        batches = by_length.reshape(-1, self._batch_size)
        return draw.permutation(batches, axis=0).reshape(-1)
