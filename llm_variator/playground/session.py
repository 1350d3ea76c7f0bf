"""Documents compressed once and asked many times, dense and with plugins, one request at a time. Knows no page."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from llm_variator.engine.contexts import CompressedContext
from llm_variator.engine.contexts.inputs import encode
from llm_variator.errors import VariatorError
from llm_variator.measures.compare import DENSE
from llm_variator.measures.timing import wait
from llm_variator.model import VariatorModel
from llm_variator.playground.panels import Panel, operations, parted
from llm_variator.playground.view import View, pieces

_ROOM = 64
"""Tokens left for a question when a document is read."""
_BEAT = 0.5
"""Seconds after which whoever waits is given the chance to go."""


@dataclasses.dataclass
class Document:
    """A text, and the contexts that hold it so far."""

    text: str
    chat: bool
    contexts: dict[str | None, CompressedContext] = dataclasses.field(default_factory=dict)
    """By plugin; None: dense."""
    seconds: dict[str | None, float] = dataclasses.field(default_factory=dict)
    """What reading it took, where it was read here."""

    @property
    def prompt(self) -> Any:
        """What the model reads: the text, or a chat that it begins."""
        return [{"role": "user", "content": self.text}] if self.chat else self.text

    def free(self) -> None:
        """Give the memory back."""
        self.contexts.clear()


class _Tokens(BaseStreamer):
    """Puts each new token into `news`, and when it came."""

    def __init__(self, news: queue.SimpleQueue[Any]) -> None:
        self._news = news
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            for token in value.flatten().tolist():
                self._news.put((token, time.perf_counter()))
        self._prompt = False

    def end(self) -> None:
        """Whoever runs `generate` says when it is done, also after an error."""


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Nobody waits for the result any more."""


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
        document = Document(text, chat)
        tokens, room = encode(document.prompt, self.tokenizer, None).ids.shape[1], self._room()
        most = None if room is None else room - self.max_new_tokens - _ROOM
        if most is not None and tokens > most:
            raise VariatorError(
                f"the document has {tokens:,} tokens; this model reads {room:,}, which leaves {most:,} beside a "
                "question and its answer: shorten it"
            )
        return document

    def read(self, document: Document, plugin: str | None) -> CompressedContext:
        """The document under a plugin (None: dense), compressed once."""
        for _ in self.reading(document, plugin):
            pass
        return document.contexts[plugin]

    def reading(self, document: Document, plugin: str | None) -> Iterator[None]:
        """`read`, which can be given up: yields now and then, and ends soon when closed."""
        if plugin in document.contexts:
            return

        def compress() -> None:
            wait(self.model.device)
            started = time.perf_counter()
            context = self.model.compress(document.prompt, tokenizer=self.tokenizer)
            wait(self.model.device)
            document.seconds[plugin] = time.perf_counter() - started
            document.contexts[plugin] = context

        for _ in self._in_turn(compress, plugin, queue.SimpleQueue()):
            yield

    def views(self, document: Document) -> tuple[list[str], list[View]]:
        """The document's pieces, and what each context that was read holds of them, the dense one first."""
        contexts = sorted(document.contexts.values(), key=lambda context: context.plugin is not None)
        ids = contexts[0].input_ids[0].tolist()
        return pieces(self.tokenizer, ids), [View.of(context) for context in contexts]

    def ask(self, document: Document, question: str, plugins: Sequence[str]) -> Iterator[list[Panel]]:
        """Answers, the dense one first: all panels as they are now, again and again. Ends soon when closed.

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
            for _ in self.reading(document, name):
                yield list(panels.values())
            context = document.contexts[name]
            self._check_room(context, question)
            panels[name] = self._with_costs(panels[name], context, document.seconds.get(name))
            yield list(panels.values())
            tokens: list[int] = []
            for new, figures in self._answer(context, question):
                if new:
                    tokens += new
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
            messages = context.messages[0]
            text = messages[0].get("content")
            if not isinstance(text, str) or messages != Document(text, chat=True).prompt:
                raise VariatorError(
                    f"{file.name} holds a conversation: the playground takes files of one document"
                )
        else:
            text = str(self.tokenizer.decode(context.input_ids[0], skip_special_tokens=True))
            if not text or not torch.equal(encode(text, self.tokenizer).ids, context.input_ids.cpu()):
                raise VariatorError(
                    f"{file.name} was not read from a text alone, and no other plugin could read the same: the "
                    "playground takes files of one document"
                )
        return Document(text, context.messages is not None, {context.plugin: context})

    def _with_costs(self, panel: Panel, context: CompressedContext, seconds: float | None) -> Panel:
        report = context.report()
        return dataclasses.replace(
            panel,
            state="reads the question",
            read_seconds=seconds,
            kv_bytes=report.bytes,
            kv_ratio=report.bytes / report.dense_bytes,
            operations=operations(self.model, context.plugin, context.tokens),
        )

    def _answer(
        self, context: CompressedContext, question: str
    ) -> Iterator[tuple[list[int], dict[str, float | None]]]:
        """Greedy tokens that came since the last time, and the speeds so far."""
        pad = (
            self.tokenizer.eos_token_id
            if self.tokenizer.pad_token_id is None
            else self.tokenizer.pad_token_id
        )
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        begun: list[float] = []

        def generate() -> None:
            begun.append(time.perf_counter())
            self.model.generate(
                _asked(context, question), context=context, max_new_tokens=self.max_new_tokens, do_sample=False,
                pad_token_id=pad, streamer=_Tokens(news),
            )  # fmt: skip

        arrivals: list[float] = []
        for found in self._in_turn(generate, context.plugin, news):
            arrivals += [when for _, when in found]
            decoding = arrivals[-1] - arrivals[0] if arrivals else 0
            yield (
                [token for token, _ in found],
                {
                    "first_token_seconds": arrivals[0] - begun[0] if arrivals else None,
                    "tokens_per_second": (len(arrivals) - 1) / decoding if decoding else None,
                },
            )

    def _in_turn(
        self, work: Callable[[], None], plugin: str | None, news: queue.SimpleQueue[Any]
    ) -> Iterator[list[Any]]:
        """Do `work` with a plugin when nobody else's runs. Yields what it puts into `news`, and now and then nothing.

        It runs in a thread of its own, so that whoever waits can go: closing this ends it before the next layer.
        """
        stop = threading.Event()
        failed: list[Exception] = []

        def run() -> None:
            try:
                with self._running, self._until(stop), self.model.use_plugin(plugin):
                    work()
            except _Stopped:
                pass
            except Exception as error:  # for whoever waits
                failed.append(error)
            news.put(None)

        threading.Thread(target=run, daemon=True).start()
        ended = False
        try:
            while not ended:
                found = []
                with contextlib.suppress(queue.Empty):
                    found.append(news.get(timeout=_BEAT))
                    while True:
                        found.append(news.get_nowait())
                ended = None in found
                yield [each for each in found if each is not None]
        finally:
            stop.set()
        if failed:
            raise failed[0]

    @contextlib.contextmanager
    def _until(self, stop: threading.Event) -> Iterator[None]:
        """Passes of the model end at their next layer once `stop` is set."""

        def check(*_: Any) -> None:
            if stop.is_set():
                raise _Stopped

        check()
        handles = [layer.register_forward_pre_hook(check) for layer in self.model.base.get_decoder().layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _room(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def _check_room(self, context: CompressedContext, question: str) -> None:
        after, _ = context.appended(_asked(context, question), None)
        room, needed = self._room(), after.tokens + self.max_new_tokens
        if room is not None and needed > room:
            raise VariatorError(
                f"document, question and answer need {needed:,} tokens, the model reads {room:,}: shorten the question"
            )


def _asked(context: CompressedContext, question: str) -> Any:
    if context.messages is not None:
        return [{"role": "user", "content": question}]
    return f"\n\nQuestion: {question}\nAnswer:"
