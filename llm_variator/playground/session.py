"""Documents compressed once and asked many times, dense and with plugins, one request at a time. Knows no page."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from llm_variator.engine.contexts import CompressedContext
from llm_variator.errors import VariatorError
from llm_variator.measures.compare import DENSE
from llm_variator.model import VariatorModel
from llm_variator.playground.panels import Panel, operations, parted
from llm_variator.playground.view import View, pieces

T = TypeVar("T")
_ROOM = 64
"""Tokens left for a question when a document is read."""


@dataclasses.dataclass
class Document:
    """A text, and the contexts that hold it so far."""

    text: str
    chat: bool
    contexts: dict[str | None, CompressedContext] = dataclasses.field(default_factory=dict)
    """By plugin; None: dense."""
    seconds: dict[str | None, float] = dataclasses.field(default_factory=dict)
    """What reading it took, where it was read here."""

    def free(self) -> None:
        """Give the memory back."""
        self.contexts.clear()


class _Tokens(BaseStreamer):
    """Hands on each new token and when it came."""

    def __init__(self) -> None:
        self.queue: queue.Queue[tuple[int, float] | None] = queue.Queue()
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            for token in value.flatten().tolist():
                self.queue.put((token, time.perf_counter()))
        self._prompt = False

    def end(self) -> None:
        """The worker says when it is done, also after an error."""


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.new_full((len(input_ids),), self._event.is_set(), dtype=torch.bool)


class Playground:
    """One model with its plugins, for any number of users: their requests run one after the other.

    Args:
        model: with the plugins to compare loaded.
        tokenizer: of the model.
        max_new_tokens: of an answer.
    """

    def __init__(self, model: VariatorModel, tokenizer: Any, max_new_tokens: int = 128) -> None:
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens
        self._running = threading.Lock()

    @property
    def has_template(self) -> bool:
        """Whether documents and questions can be chat messages."""
        return bool(self.tokenizer.chat_template)

    def open(self, text: str, *, chat: bool) -> Document:
        """A document, not read yet.

        Raises:
            VariatorError: it is empty or too long, or the model has no chat template.
        """
        if not text.strip():
            raise VariatorError("the document is empty: paste a text, or drop a file")
        if chat and not self.has_template:
            raise VariatorError("this model has no chat template: switch off \u201cas a chat\u201d")
        tokens, room = self._count(text), self._room()
        most = None if room is None else room - self.max_new_tokens - _ROOM
        if most is not None and tokens > most:
            raise VariatorError(
                f"the document has {tokens:,} tokens; this model reads {room:,}, which leaves {most:,} beside a "
                "question and its answer: shorten it"
            )
        return Document(text, chat)

    def read(self, document: Document, plugin: str | None) -> CompressedContext:
        """The document under a plugin (None: dense), compressed once."""
        if plugin not in document.contexts:
            what = [{"role": "user", "content": document.text}] if document.chat else document.text

            def compress() -> CompressedContext:
                started = time.perf_counter()
                with self.model.use_plugin(plugin):
                    context = self.model.compress(what, tokenizer=self.tokenizer)
                document.seconds[plugin] = time.perf_counter() - started
                return context

            document.contexts[plugin] = self._alone(compress)
        return document.contexts[plugin]

    def views(self, document: Document) -> tuple[list[str], list[View]]:
        """The document's pieces, and what each context that was read holds of them, the dense one first."""
        contexts = sorted(document.contexts.values(), key=lambda context: context.plugin is not None)
        ids = contexts[0].input_ids[0].tolist()
        return pieces(self.tokenizer, ids), [View.of(context) for context in contexts]

    def ask(self, document: Document, question: str, plugins: Sequence[str]) -> Iterator[list[Panel]]:
        """Answers, the dense one first; after each token all panels as they are now.

        Raises:
            VariatorError: the question is empty, or there is no room for it.
        """
        if not question.strip():
            raise VariatorError("the question is empty: ask something about the document")
        names: list[str | None] = [None, *plugins]
        panels = {name: Panel(name or DENSE, state="waits") for name in names}
        dense: list[int] | None = None
        for name in names:
            panels[name] = dataclasses.replace(panels[name], state="reads the document")
            yield list(panels.values())
            context = self.read(document, name)
            self._check_room(context, question)
            panels[name] = self._costs(document, panels[name], name)
            yield list(panels.values())
            tokens: list[int] = []
            for token, figures in self._answer(context, question, document.chat):
                tokens.append(token)
                same, rest, place = parted(self.tokenizer, tokens, dense)
                changes: dict[str, Any] = dict(
                    figures, same=same, parted=rest, same_tokens=place, state="writes"
                )
                panels[name] = dataclasses.replace(panels[name], **changes)
                yield list(panels.values())
            dense = tokens if dense is None else dense
            first, own = panels[None].first_token_seconds, panels[name].first_token_seconds
            ratio = own / first if own and first else None
            panels[name] = dataclasses.replace(
                panels[name], state="", first_token_ratio=ratio, same_tokens=parted(self.tokenizer, tokens, dense)[2]
            )  # fmt: skip
            yield list(panels.values())

    def save(self, document: Document, plugin: str | None, folder: Path) -> Path:
        """The context of a plugin as a file in `folder`."""
        context = self.read(document, plugin)
        file = folder / f"context-{plugin or DENSE}.safetensors"
        context.save(file)
        return file

    def load(self, file: Path) -> Document:
        """The document of a file that `save` wrote, with its one context.

        Raises:
            VariatorError: it is none, is damaged, or belongs to another model or plugin.
        """
        context = CompressedContext.load(file, self.model, tokenizer=self.tokenizer)
        if context.rows != 1:
            raise VariatorError(
                f"{file.name} holds {context.rows} rows: the playground takes files of one document"
            )
        if context.messages is not None:
            text = str(context.messages[0][0]["content"])
        else:
            text = str(self.tokenizer.decode(context.input_ids[0], skip_special_tokens=True))
        return Document(text, context.messages is not None, {context.plugin: context})

    def _costs(self, document: Document, panel: Panel, name: str | None) -> Panel:
        report, dense = document.contexts[name].report(), document.contexts[name].report().dense_bytes
        return dataclasses.replace(
            panel,
            state="reads the question",
            read_seconds=document.seconds.get(name),
            kv_bytes=report.bytes,
            kv_ratio=report.bytes / dense,
            operations=operations(self.model, name, document.contexts[name].tokens),
        )

    def _answer(
        self, context: CompressedContext, question: str, chat: bool
    ) -> Iterator[tuple[int, Mapping[str, float | None]]]:
        """Greedy tokens as they come, each with the speeds so far."""
        asked = [{"role": "user", "content": question}] if chat else f"\n\nQuestion: {question}\nAnswer:"
        pad = (
            self.tokenizer.eos_token_id
            if self.tokenizer.pad_token_id is None
            else self.tokenizer.pad_token_id
        )
        streamer, stop, failed = _Tokens(), threading.Event(), []
        begun: list[float] = []

        def run() -> None:
            try:
                with self._running, self.model.use_plugin(context.plugin):
                    begun.append(time.perf_counter())
                    self.model.generate(
                        asked, context=context, max_new_tokens=self.max_new_tokens, do_sample=False,
                        pad_token_id=pad, streamer=streamer, stopping_criteria=StoppingCriteriaList([_Stop(stop)]),
                    )  # fmt: skip
            except BaseException as error:  # for whoever waits
                failed.append(error)
            streamer.queue.put(None)

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        arrivals: list[float] = []
        try:
            while (item := streamer.queue.get()) is not None:
                token, when = item
                arrivals.append(when)
                decoding = when - arrivals[0]
                yield (
                    token,
                    {
                        "first_token_seconds": arrivals[0] - begun[0],
                        "tokens_per_second": (len(arrivals) - 1) / decoding if decoding else None,
                    },
                )
        finally:  # also when nobody listens any more
            stop.set()
        worker.join()
        if failed:
            raise failed[0]

    def _alone(self, work: Callable[[], T]) -> T:
        with self._running:
            return work()

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    def _room(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_room(self, context: CompressedContext, question: str) -> None:
        room, needed = self._room(), context.tokens + self._count(question) + self.max_new_tokens
        if room is not None and needed > room:
            raise VariatorError(
                f"document, question and answer need {needed:,} tokens, the model reads {room:,}: shorten the question"
            )
