"""The live page, by Gradio: a document, a question, answers side by side, and what each head keeps."""

from __future__ import annotations

import dataclasses
import functools
import html
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llm_variator.errors import VariatorError
from llm_variator.extras import needed
from llm_variator.measures.compare import DENSE
from llm_variator.playground import render
from llm_variator.playground.documents import KINDS, read_document
from llm_variator.playground.panels import Panel, label
from llm_variator.playground.session import Document, Playground

ONE_AT_A_TIME = dict(concurrency_id="model", concurrency_limit=1)
_KEPT_SECONDS = 3600
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'self'"
)


def gradio() -> Any:
    """The library, told to report nothing to anybody.

    Raises:
        VariatorError: it is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return needed("gradio", "the playground", "playground")


def build(playground: Playground, title: str) -> Any:
    """The page as `gradio.Blocks`; each user has a document of their own."""
    gr = gradio()
    names = list(playground.model.plugins)
    with gr.Blocks(title="llm_variator playground", analytics_enabled=False) as page:
        document = gr.State(None, time_to_live=_KEPT_SECONDS, delete_callback=lambda own: own and own.free())
        panels = gr.State([], time_to_live=_KEPT_SECONDS)
        gr.HTML(f'<h1>What the cache keeps</h1><p class="lead">{html.escape(title)}</p>')
        with gr.Row():
            with gr.Column(scale=3):
                text = gr.Textbox(label="Document", lines=10, max_lines=10, elem_id="text")
                chat = gr.Checkbox(playground.has_template, label="as a chat", elem_id="chat")
            with gr.Column(scale=2):
                file = gr.File(label=f"or a file ({', '.join(KINDS)})", elem_id="file", height=165)
                saved = gr.File(label="or a saved context (.safetensors)", elem_id="saved", height=165)
        chosen = gr.CheckboxGroup(
            names, value=names[:2], label="Plugins beside the dense model", elem_id="plugins"
        )
        with gr.Row():
            read = gr.Button("Read the document", elem_id="read")
            conditions = [(label(name), name) for name in (DENSE, *names)]
            which = gr.Dropdown(
                conditions, value=(names or [DENSE])[0], label="Save the context of", elem_id="which"
            )
            save = gr.Button("Save context", elem_id="save")
        download = gr.File(label="Saved context", visible=False, interactive=False, elem_id="download")
        question = gr.Textbox(label="Question", elem_id="question")
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=4)
            stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=1)
        said = gr.HTML(elem_id="said")
        answers = gr.HTML(elem_id="answers")
        view = gr.HTML(elem_id="view")

        events: Any = dict(ONE_AT_A_TIME, show_progress="full", show_progress_on=said)
        on = _Events(playground)
        skip = gr.skip()
        # a box that holds a file takes no other: it is emptied
        file.upload(_told(on.upload, None, skip), [file], [said, file, text], **events)
        loading = [said, saved, document, text, chat, view]
        saved.upload(_told(on.load, None, *[skip] * 4), [saved], loading, **events)
        reading = read.click(
            _told(on.read, *[skip] * 2), [document, text, chat, chosen], [said, document, view], **events
        )
        asking: Any = dict(
            fn=_told(on.ask, *[skip] * 4), inputs=[document, text, chat, chosen, question], **events
        )
        asking["outputs"] = [said, document, panels, answers, view]
        saving = save.click(
            _told(on.save, *[skip] * 2), [document, text, chat, which], [said, document, download], **events
        )
        running = [reading, ask.click(**asking), question.submit(**asking), saving]
        stop.click(on.stop, [panels], [said, answers], cancels=running, queue=False)
    return page.queue(max_size=32)


def launch(page: Any, *, host: str, port: int | None, upload_megabytes: int) -> str:
    """Serve the page in a thread of its own; returns its address.

    Raises:
        VariatorError: the port is taken.
    """
    gr = gradio()
    from starlette.middleware import Middleware

    fonts = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Base(font=fonts[0], font_mono=fonts[1])
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, prevent_thread_lock=True,
            ssr_mode=False, max_file_size=f"{upload_megabytes}mb", theme=theme, css=_styles(), footer_links=[],
            enable_monitoring=False, app_kwargs={"middleware": [Middleware(_PolicyHeaders)]},
        )  # fmt: skip
    except OSError as error:
        raise VariatorError(f"cannot serve at {host}:{port} ({error}): choose another --port") from None
    return str(address)


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Where uploads and saved contexts go, until the process ends; set before the page is built."""
    folder: tempfile.TemporaryDirectory[str] = tempfile.TemporaryDirectory(prefix="llm-variator-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    return folder


class _PolicyHeaders:
    """Tells the browser to ask nobody but this server for anything."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self._app(scope, receive, with_policy)


def _styles() -> str:
    """The report's colours, light and dark as Gradio switches them, and the shape of the page's own parts."""
    light, dark = re.findall(r":root \{(.*?)\}", render.styles("page.css"), re.DOTALL)
    own = render.styles("playground.css") + render.styles("live.css")
    return f":root {{{light}}}\n.dark {{{dark}}}\n{own}"


def _told(
    work: Callable[..., Iterator[tuple[Any, ...]]], *others: Any
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """With a sentence for what went wrong, and `others` for the outputs behind it."""

    @functools.wraps(work)
    def told(*inputs: Any) -> Iterator[tuple[Any, ...]]:
        try:
            yield from work(*inputs)
            return
        except VariatorError as error:
            sentence = " ".join(str(error).split())
        except Exception as error:  # out of memory, say
            traceback.print_exc()
            sentence = f"that failed ({type(error).__name__}): the terminal of the server says more"
        yield (f'<p class="alert" role="alert">{html.escape(sentence)}</p>', *others)

    return told


def _done(words: str) -> str:
    return f'<p class="done" role="status">{html.escape(words)}</p>'


class _Events:
    """What happens when somebody does something; each yields what is said, then the outputs."""

    def __init__(self, playground: Playground) -> None:
        self._playground = playground
        self._skip = gradio().skip()

    def upload(self, file: str) -> Iterator[tuple[Any, ...]]:
        """A file's text, into the document's box."""
        text = read_document(Path(file))
        self._playground.open(text, chat=False)
        yield _done(f"{Path(file).name}: {len(text):,} characters"), None, text

    def load(self, file: str) -> Iterator[tuple[Any, ...]]:
        """A saved context, as the document."""
        document = self._playground.load(Path(file))
        (plugin,) = document.contexts
        yield (
            _done(f"loaded: {label(plugin)} has read it"),
            None,
            document,
            document.text,
            document.chat,
            self._view(document),
        )

    def read(
        self, document: Document | None, text: str, chat: bool, plugins: list[str]
    ) -> Iterator[tuple[Any, ...]]:
        """The document, dense and with the plugins."""
        document = self._current(document, text, chat)
        names = [None, *plugins]
        for place, name in enumerate(names):
            words = f"{label(name)} reads the document, {place + 1} of {len(names)}"
            yield _done(words), document, self._skip
            for _ in self._playground.reading(document, name):
                yield _done(words), document, self._skip
        context = document.contexts[None]
        yield _done(f"read: {context.tokens:,} tokens"), document, self._view(document)

    def ask(
        self, document: Document | None, text: str, chat: bool, plugins: list[str], question: str
    ) -> Iterator[tuple[Any, ...]]:
        """Answers as they come; the document is read first where it is new."""
        document, panels = self._current(document, text, chat), []
        for panels in self._playground.ask(document, question, plugins):
            working = next((f"{panel.label} {panel.state}" for panel in panels if panel.state), "")
            yield _done(working), document, panels, render.answers(panels), self._skip
        yield _done("answered"), document, panels, render.answers(panels), self._view(document)

    def stop(self, panels: list[Panel]) -> tuple[str, Any]:
        """What is said once the request has been given up."""
        idle = [dataclasses.replace(panel, state="") for panel in panels]
        return _done("stopped"), render.answers(idle) if idle else self._skip

    def save(self, document: Document | None, text: str, chat: bool, which: str) -> Iterator[tuple[Any, ...]]:
        """A context as a file to download."""
        document = self._current(document, text, chat)
        plugin = None if which == DENSE else which
        for _ in self._playground.reading(document, plugin):
            yield _done(f"{label(plugin)} reads the document"), document, self._skip
        folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
        file = self._playground.save(document, plugin, folder)
        size = file.stat().st_size / 1e6
        yield _done(f"saved: {size:.1f} MB"), document, gradio().File(str(file), visible=True)

    def _current(self, document: Document | None, text: str, chat: bool) -> Document:
        """The document that was read, or a new one where its text has changed."""
        if (
            document is not None
            and document.contexts
            and (document.text, document.chat) == (text or "", chat)
        ):
            return document
        return self._playground.open(text or "", chat=chat)

    def _view(self, document: Document) -> str:
        pieces, views = self._playground.views(document)
        page = html.escape(render.document(pieces, views))
        return f'<iframe class="view" title="what is kept" sandbox="allow-scripts" srcdoc="{page}"></iframe>'
