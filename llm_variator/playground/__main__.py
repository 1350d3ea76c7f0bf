"""`python -m llm_variator.playground`: a page on one's own text, live or as a file."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llm_variator import cli
from llm_variator.cli import flag, flags, spelled
from llm_variator.cli.values import OutputFile, Port, PositiveInt
from llm_variator.errors import VariatorError
from llm_variator.generate import encode, parse_plugins, read_prompt
from llm_variator.measures.compare import print_comparison
from llm_variator.measures.loading import load_variator
from llm_variator.measures.results import scrub_paths
from llm_variator.playground.documents import read_document
from llm_variator.playground.export import export
from llm_variator.playground.session import Playground
from llm_variator.sources.models import load_tokenizer, shipped_plugins

_SHOWN = ("kv4", "k2-ffn")  # of a model's shipped plugins


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export: one prompt as a page, without a server."""

    export: OutputFile | None = flag(None, "write the page and end", metavar="FILE")
    prompt: str | None = flag(None, "the prompt itself", metavar="TEXT")
    prompt_file: str | None = flag(None, "text, Markdown or PDF; - is stdin", metavar="FILE")
    chat: bool = flag(False, "wrap the prompt in the model's chat template")
    repetitions: PositiveInt | None = flag(None, "timings of the first token, interleaved (default: 5)")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The live page."""

    host: str | None = flag(
        None, "where to listen (default: 127.0.0.1, which this machine alone can reach)", metavar="ADDRESS"
    )
    port: Port | None = flag(None, "default: the first free one from 7860")
    upload_megabytes: PositiveInt | None = flag(None, "the largest file that is taken (default: 300)")


@dataclass(frozen=True, kw_only=True)
class Settings(flags.BaseModel, Serving, Export):
    """See on one's own text which tokens a compressed cache keeps, what it costs and what changes in the answer.

    A page at a local address; it needs the extra [playground], asks nobody else for anything and reports nothing.
    """

    model: str = flag("smollm2-135m", "decoder: alias, local folder or hub id")
    plugin: tuple[str, ...] = flag(
        (),
        f"plugins to compare (default: the model's own {' and '.join(_SHOWN)})",
        metavar="[NAME=]PLUGIN",
        repeats=True,
    )
    max_new_tokens: PositiveInt = flag(128, "tokens of an answer")

    def __post_init__(self) -> None:
        mode, other = ("the live page", Export) if self.export is None else ("--export", Serving)
        surplus = [field for field in dataclasses.fields(other) if getattr(self, field.name) != field.default]
        if surplus:
            given = ", ".join(spelled(field.name) for field in surplus)
            raise VariatorError(
                f"{mode} does without {given}: leave it out{', or add --export' * (other is Export)}"
            )

    def plugins(self) -> dict[str, str]:
        """Plugins by name."""
        own = [f"{self.model}/{name}" for name in _SHOWN]
        return parse_plugins(self.plugin or [name for name in own if name in shipped_plugins()])


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives."""
    return cli.read(Settings, argv, prog="python -m llm_variator.playground")


def open_playground(settings: Settings) -> Playground:
    """The model with its plugins."""
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    model = load_variator(settings)
    model.decoder_only("the playground", "it shows what a KV cache keeps")
    for name, plugin in settings.plugins().items():
        model.load_plugin(plugin, plugin_name=name)
    with (
        model.disable_plugin()
    ):  # the dense reading is always the first: it is not to load the weights as well
        model.compress(torch.ones(1, 16, dtype=torch.long, device=model.device))
    return Playground(model, tokenizer, settings.max_new_tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page, or write it; raises VariatorError for wrong input."""
    settings = read(argv)
    if settings.export is not None:
        _export(settings, settings.export, sys.argv[1:] if argv is None else argv)
        return
    from llm_variator.playground import page

    page.gradio()  # what is missing is said before a model is loaded
    with page.temporary_folder():
        playground = open_playground(settings)
        conditions = ", ".join(["dense", *playground.model.plugins])
        blocks = page.build(playground, f"{settings.model}: {conditions}")
        address = page.launch(
            blocks,
            host=settings.host or "127.0.0.1",
            port=settings.port,
            upload_megabytes=settings.upload_megabytes or 300,
        )
        print(f"{address} (end with Ctrl+C)", flush=True)
        blocks.block_thread()


def _export(settings: Settings, file: Path, argv: Sequence[str]) -> None:
    if settings.prompt is not None or settings.prompt_file in (None, "-"):
        prompt = read_prompt(settings.prompt, settings.prompt_file)
    else:
        prompt = read_document(Path(settings.prompt_file))
    playground = open_playground(settings)
    model, tokenizer = playground.model, playground.tokenizer
    ids = encode(tokenizer, prompt, model, settings.max_new_tokens, chat=settings.chat)
    command = scrub_paths(f"python -m llm_variator.playground {shlex.join(argv)}")
    rows = export(
        file, model, tokenizer, ids, name=settings.model, command=command,
        max_new_tokens=settings.max_new_tokens, repetitions=settings.repetitions or 5,
    )  # fmt: skip
    print_comparison(rows, ids.shape[1], settings.max_new_tokens)
    print(f"{file}: {file.stat().st_size / 1e3:,.0f} kB")


if __name__ == "__main__":
    cli.run(main)
