"""What scores of keys are fitted on: contexts, and texts that may follow each of them. Knows no model.

Three futures: the text goes on; it is asked for again, word for word; questions about its passages are answered.
Sample number i is a pure function of the data, the seed and i.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import TASK, Source, cut_windows, read_documents, tokenize
from llm_variator.sources.tasks import find_task, load_examples
from llm_variator.sources.tasks.examples import Example

FUTURES = ("continuation", "repetition", "questions")
KINDS = ("text", "passages")
"""Of samples: passages have questions."""
CONTINUATION = 128  # tokens that go on
STRETCH = 512  # most neighbouring tokens of one context that a sample fits
_QUESTIONS = 320  # most tokens of questions with their answers
_REQUEST = "\n\nRepeat the previous text exactly.\n\n"
_DOCUMENTS_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Sample:
    """A context, which of its tokens are fitted, and what may follow it."""

    kind: str
    context: Tensor
    """int64 (tokens,)."""
    rows: slice
    """The tokens that are fitted; each future reads these."""
    futures: Mapping[str, Tensor]
    """By name, int64 (tokens,) each."""


class Samples(Sequence[Sample]):
    """The samples of a run: of texts and, where a source is a task with passages and questions, of those, in turn."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        count: int,
        lengths: Sequence[int],
        ends: tuple[int, int],
        seed: int,
        data_dir: Path | None = None,
    ) -> None:
        """`count` samples whose contexts have `lengths` tokens, each of them as many tokens in all.

        `ends`: first and last tokens of a context that are not fitted.

        Raises:
            VariatorError: a source cannot be read, has too little text, or contexts are too short.
        """
        if short := [length for length in lengths if length <= sum(ends)]:
            raise VariatorError(
                f"--fit-tokens {short[0]} leaves no token between --dense-head {ends[0]} and --dense-tail {ends[1]}: "
                "make contexts longer"
            )
        self._lengths = _spread(count, lengths)
        self._ends, self._seed, self._count = ends, seed, count
        ask = tokenizer(_REQUEST, add_special_tokens=False)["input_ids"]
        self._request = torch.tensor(ask, dtype=torch.long)
        passages = [source for source in sources if _has_passages(source.name)]
        texts = [source for source in sources if source not in passages]
        self.has_questions = bool(passages)
        self.longest = max(lengths) + max(CONTINUATION, _QUESTIONS, min(STRETCH, max(lengths)) + len(ask))
        """The most tokens that a context and one of its futures may have together."""
        self._kinds = [kind for kind, found in zip(KINDS, (texts, passages), strict=True) if found]
        wanted = {kind: self._of_kind(kind) for kind in self._kinds}
        self._windows: dict[int, Tensor] = {}
        if texts:
            tokens = {n: (n + CONTINUATION) * _times(wanted["text"], n) for n in set(lengths)}
            self._windows = self._read_texts(texts, tokenizer, tokens, data_dir)
        if passages:
            self._passages = _Passages(passages, tokenizer, seed=seed, data_dir=data_dir)
            self._passages.check(max(wanted["passages"], default=0))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < self._count:
            raise IndexError(index)
        kind = self._kinds[index % len(self._kinds)]
        length = self._lengths[index]
        draw = np.random.default_rng((self._seed, 5, index))
        if kind == "text":
            earlier = [self._lengths[i] for i in range(index % len(self._kinds), index, len(self._kinds))]
            window = self._windows[length][earlier.count(length)].long()
            rows = self._rows(draw, length)
            context, futures = window[:length], {"continuation": window[length:]}
        else:
            context, spans, goes_on = self._passages.context(draw, length)
            rows = self._rows(draw, length)
            futures = {
                "continuation": goes_on[:CONTINUATION],
                "questions": self._passages.questions(draw, spans, rows),
            }
        return Sample(
            kind, context, rows, futures | {"repetition": torch.cat((self._request, context[rows]))}
        )

    def _of_kind(self, kind: str) -> list[int]:
        """The contexts' lengths of all samples of one kind."""
        return self._lengths[self._kinds.index(kind) :: len(self._kinds)]

    def _rows(self, draw: np.random.Generator, length: int) -> slice:
        """A stretch of a context of `length` tokens."""
        head, tail = self._ends
        size = min(STRETCH, length - head - tail)
        start = head + int(draw.integers(length - tail - head - size, endpoint=True))
        return slice(start, start + size)

    def _read_texts(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        tokens: Mapping[int, int],
        data_dir: Path | None,
    ) -> dict[int, Tensor]:
        """Windows of each length with its continuation, from all sources in turn, none with another's text."""
        total = sum(source.weight for source in sources)
        parts: dict[int, list[Tensor]] = {length: [] for length in tokens}
        for source in sources:
            share = source.weight / total
            documents = _documents(source.name, data_dir)
            random.Random(self._seed).shuffle(documents)
            stream = _Stream(documents, tokenizer)
            for length, wanted in sorted(tokens.items()):
                size = length + CONTINUATION
                if wanted:
                    parts[length].append(stream.windows(int(wanted * share) // size + 1, size))
        made: dict[int, Tensor] = {}
        for length, found in parts.items():
            rows = tokens[length] // (length + CONTINUATION)
            if sum(map(len, found)) < rows:
                raise VariatorError(
                    f"{', '.join(source.name for source in sources)}: text for {sum(map(len, found))} contexts of "
                    f"{length} tokens, {rows} are wanted: give more --data, fewer --fit-samples or shorter --fit-tokens"
                )
            if found:
                order = np.random.default_rng((self._seed, 6, length)).permutation(sum(map(len, found)))
                made[length] = torch.cat(found)[torch.from_numpy(order[:rows])]
        return made


def _spread(count: int, lengths: Sequence[int]) -> list[int]:
    """A length for each of `count` samples, so that every length has about as many tokens, spread evenly."""
    share = np.array([1 / length for length in lengths])
    share, given = share / share.sum(), np.zeros(len(lengths))
    order = []
    for index in range(count):
        chosen = int(np.argmax(share * (index + 1) - given))
        given[chosen] += 1
        order.append(lengths[chosen])
    return order


def _times(lengths: Sequence[int], length: int) -> int:
    return list(lengths).count(length)


def _has_passages(source: str) -> bool:
    """Whether a source is a task of questions about passages."""
    return source.startswith(TASK) and {"question", "context"} <= set(
        find_task(source.removeprefix(TASK)).columns
    )


def _documents(source: str, data_dir: Path | None) -> list[str]:
    if not source.startswith(TASK):
        return read_documents(source, data_dir)
    examples = load_examples(source.removeprefix(TASK), "train", data_dir=data_dir)
    return [example.decoder_prompt + example.continuation for example in examples]


class _Stream:
    """Windows cut one after the other from documents, which are tokenised as they are needed."""

    def __init__(self, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self._documents, self._tokenizer, self._next = documents, tokenizer, 0

    def windows(self, count: int, size: int) -> Tensor:
        """At most `count` windows of `size` tokens; what is left of their documents is dropped."""
        read: list[Tensor] = []
        while self._next < len(self._documents) and sum(len(part) + 1 for part in read) < count * size:
            part = self._documents[self._next : self._next + _DOCUMENTS_AT_ONCE]
            self._next += len(part)
            read += tokenize(part, self._tokenizer)
        return cut_windows(read, size, self._tokenizer)[:count]


class _Passages:
    """Passages with their questions, of tasks that have such."""

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        data_dir: Path | None,
    ) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._groups: list[list[Example]] = []
        for source in sources:
            examples = load_examples(source.name.removeprefix(TASK), "train", data_dir=data_dir)
            self._groups += [
                list(part) for _, part in groupby(examples, key=lambda one: one.inputs["context"])
            ]

    def check(self, length: int) -> None:
        """Raise where the passages do not fill a context of `length` tokens."""
        draw = np.random.default_rng(self._seed)
        self.context(draw, length)

    def context(
        self, draw: np.random.Generator, length: int
    ) -> tuple[Tensor, list[tuple[int, int, list[Example]]], Tensor]:
        """A context of `length` tokens that ends within a passage, with each passage's (start, stop, questions).

        Each passage is followed by one of its questions with the answer, as in a prompt with examples; the others
        are still to be asked. Last: the tokens that go on.
        """
        ids: list[int] = list(self._tokenizer("")["input_ids"][:1])
        spans: list[tuple[int, int, list[Example]]] = []
        for number in draw.permutation(len(self._groups)):
            group = [self._groups[number][i] for i in draw.permutation(len(self._groups[number]))]
            before, after = group[0].task.decoder_template.split("{context}")
            passage = self._encode(before + group[0].inputs["context"])
            spans.append((len(ids), len(ids) + len(passage), group[1:] or group))
            ids += passage + self._encode(_asked(after, group[0]) + "\n\n")
            if len(ids) >= length + CONTINUATION:
                context = torch.tensor(ids, dtype=torch.long)
                inside = [span for span in spans if span[0] < length]
                return context[:length], inside, context[length:]
        raise VariatorError(
            f"the passages of the data have {len(ids)} tokens, too few for a context of {length}: give more, or "
            "shorter --fit-tokens"
        )

    def questions(
        self, draw: np.random.Generator, spans: Sequence[tuple[int, int, list[Example]]], rows: slice
    ) -> Tensor:
        """Questions with their answers about the passages in `rows`, about each one as often as there is room."""
        inside = [span for span in spans if span[0] < rows.stop and span[1] > rows.start] or spans[-1:]
        ids: list[int] = []
        for turn in range(max(len(examples) for _, _, examples in inside)):
            for place in draw.permutation(len(inside)):
                examples = inside[place][2]
                if turn < len(examples) and len(ids) < _QUESTIONS:
                    _, after = examples[turn].task.decoder_template.split("{context}")
                    ids += self._encode(_asked(after, examples[turn]) + "\n")
        return torch.tensor(ids[:_QUESTIONS], dtype=torch.long)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _asked(template: str, example: Example) -> str:
    return template.format_map(example.inputs) + example.continuation
