"""`python -m llm_variator.generate`: continue a prompt with a plugin, or compare plugins with the base model.

The text goes to stdout and everything else to stderr, so that the output can be piped on. `--compare` prints
a table and the texts.
"""

from __future__ import annotations

import codecs
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from llm_variator import cli
from llm_variator.cli import flag, flags
from llm_variator.cli.values import NaturalFloat, OutputFile, PositiveFloat, PositiveInt
from llm_variator.errors import VariatorError
from llm_variator.measures.compare import DENSE, Generation, compare, generate, print_comparison
from llm_variator.measures.results import peak_memory_gib, write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model, load_tokenizer, shipped_plugins
from llm_variator.sources.models.aliases import ALIASES


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt: exactly one source; without a flag it is read from stdin."""

    prompt: str | None = flag(None, "the prompt itself", metavar="TEXT")
    prompt_file: str | None = flag(None, "a UTF-8 text file; - is stdin", metavar="FILE")
    chat: bool = flag(False, "wrap the prompt in the model's chat template")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Output."""

    max_new_tokens: PositiveInt = flag(128, "tokens to generate")
    stream: bool = flag(False, "print the text while it is generated")
    compare: bool = flag(False, "greedy, dense against every plugin, as a table")
    repetitions: PositiveInt | None = flag(
        None, "with --compare: timings of the first token, interleaved (default: 5)"
    )
    json: OutputFile | None = flag(None, "write the figures there too", metavar="FILE")


_COLDEST = 1e-4  # logits over less leave what 16 bits can say


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling: greedy without any of these."""

    temperature: NaturalFloat | None = flag(None, "0 is greedy")
    top_p: PositiveFloat | None = flag(None, "sample from this much probability mass")
    top_k: PositiveInt | None = flag(None, "sample from this many tokens")

    def __post_init__(self) -> None:
        if self.temperature and self.temperature < _COLDEST:
            raise VariatorError(f"--temperature {self.temperature:g} overflows: give 0 for greedy")
        if self.top_p is not None and self.top_p > 1:
            raise VariatorError(f"--top-p is a share of the probability mass, at most 1, not {self.top_p}")

    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate`; empty for greedy."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("temperature") == 0:
            return {}
        return {"do_sample": True, **given} if given else {}


@dataclass(frozen=True, kw_only=True)
class Settings(flags.BaseModel, Sampling, Output, Prompt):
    """Continue a prompt with a compression plugin, or compare plugins with the dense model."""

    model: str = flag("smollm2-135m", f"alias ({', '.join(ALIASES)}), local folder or hub id")
    plugin: tuple[str, ...] = flag(
        (),
        f"folder, hub id or shipped ({', '.join(shipped_plugins()) or 'none'}); several with --compare",
        metavar="[NAME=]PLUGIN",
        repeats=True,
    )
    device_map: Literal["auto"] | None = flag(
        None, "spread the layers over all GPUs and the CPU's memory, in place of --device"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        plugins = self.plugins()
        if self.compare:
            if not plugins:
                raise VariatorError("--compare needs something to compare with: add --plugin")
            if self.stream or self.sampling():
                raise VariatorError(
                    "--compare is greedy and prints its texts at the end: leave out --stream and sampling"
                )
        if self.repetitions and not self.compare:
            raise VariatorError("--repetitions are of the timings of --compare: add it, or leave them out")
        if len(plugins) > 1 and not self.compare:
            raise VariatorError("several plugins need --compare; give one --plugin to generate with")

    def plugins(self) -> dict[str, str]:
        """Plugins by name."""
        return parse_plugins(self.plugin)


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives."""
    return cli.read(Settings, argv, prog="python -m llm_variator.generate")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input."""
    started = time.perf_counter()
    settings = read(argv)
    plugins = settings.plugins()
    prompt = read_prompt(settings.prompt, settings.prompt_file)
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    model = VariatorModel(
        load_model(
            settings.model, device=settings.device, device_map=settings.device_map, **settings.loading()
        )
    )
    model.decoder_only("this command", "T5's generate is at hand in Python, through VariatorModel")
    for name, plugin in plugins.items():
        model.load_plugin(plugin, plugin_name=name)
    input_ids = encode(tokenizer, prompt, model, settings.max_new_tokens, chat=settings.chat)
    set_seed(settings.seed)
    if settings.compare:
        rows = compare(
            model,
            tokenizer,
            input_ids,
            max_new_tokens=settings.max_new_tokens,
            repetitions=settings.repetitions or 5,
        )
        print_comparison(rows, input_ids.shape[1], settings.max_new_tokens)
        figures: dict[str, Any] = {"rows": [asdict(row) for row in rows]}
    else:
        model.set_plugin(next(iter(plugins), None))
        inner = (
            TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if settings.stream else None
        )
        result = generate(
            model, tokenizer, input_ids, settings.max_new_tokens, inner=inner, **settings.sampling()
        )
        if not settings.stream:
            print(result.text)
        print(_summary(model.active_plugin, input_ids.shape[1], result), file=sys.stderr)
        figures = {
            "plugin": model.active_plugin or DENSE,
            "text": result.text,
            "tokens": result.tokens,
            "first_token_seconds": result.first_token_seconds,
            "tokens_per_second": result.tokens_per_second,
            "kv_bytes": result.cache.bytes,
            "kv_dense_bytes": result.cache.dense_bytes,
            "peak_memory_gib": peak_memory_gib(),
        }
    if settings.json is not None:
        figures |= {"model": settings.model, "prompt_tokens": input_ids.shape[1]}
        command = ["llm_variator.generate", *(sys.argv[1:] if argv is None else argv)]
        write_result(settings.json, figures, command=command, seed=settings.seed, started=started)


def parse_plugins(values: Sequence[str]) -> dict[str, str]:
    """`["k2=runs/a", "smollm2-135m/k4"]` -> {"k2": "runs/a", "k4": "smollm2-135m/k4"}.

    Raises:
        VariatorError: two plugins of one name, or a name that means the dense model.
    """
    plugins: dict[str, str] = {}
    for value in values:
        named = re.fullmatch(r"([\w-]+)=(.+)", value)
        plugin = named[2] if named else value
        name = named[1] if named else Path(plugin).name.replace(".", "-")
        if name in (DENSE, "dense"):
            raise VariatorError(f"--plugin {value}: {name!r} is the dense model; give another name=")
        if name in plugins:
            raise VariatorError(
                f"two plugins are called {name!r}: name them, as in --plugin a=DIR --plugin b=DIR"
            )
        plugins[name] = plugin
    return plugins


def read_prompt(text: str | None, file: str | None) -> str:
    """The prompt from its text, a UTF-8 file, or (without either, or for the file `-`) stdin.

    Raises:
        VariatorError: both are given, one is not UTF-8, the file cannot be read, or the prompt is empty.
    """
    if text is not None and file is not None:
        raise VariatorError("--prompt and --prompt-file are two prompts: leave one out")
    if text is None:
        try:
            raw = sys.stdin.buffer.read() if file in (None, "-") else Path(file).read_bytes()
            text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        except OSError as error:
            raise VariatorError(f"prompt file {file}: {error.strerror}; check the path") from None
        except UnicodeDecodeError as error:
            raise VariatorError(f"the prompt is not UTF-8 (byte {error.start}): convert it first") from None
    elif (place := re.search("[\ud800-\udfff]", text)) is not None:  # how Python holds bytes it cannot decode
        raise VariatorError(f"--prompt is not UTF-8 (character {place.start()}): convert it first")
    if not text.strip():
        raise VariatorError("the prompt is empty: give --prompt, --prompt-file or text on stdin")
    return text


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, model: VariatorModel, max_new_tokens: int, *, chat: bool
) -> Tensor:
    """The prompt's token ids (1, tokens) on the model's device.

    Raises:
        VariatorError: no chat template, no tokens, tokens the model does not know, or no room for
            `max_new_tokens` in the model's context.
    """
    if chat:
        if not tokenizer.chat_template:
            raise VariatorError("this model's tokenizer has no chat template: leave out --chat")
        prompt = tokenizer.apply_chat_template(  # type: ignore[assignment]
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
    # A chat template writes its special tokens itself.
    ids = tokenizer(prompt, add_special_tokens=not chat, verbose=False)["input_ids"]
    if not ids:
        raise VariatorError("the prompt is empty: the tokenizer makes no token of it")
    config = model.config.get_text_config()
    if max(ids) >= config.vocab_size:
        raise VariatorError(
            f"token {max(ids)} is outside the model's vocabulary of {config.vocab_size}: "
            f"the tokenizer belongs to another model"
        )
    room = getattr(config, "max_position_embeddings", None)
    if room is not None and len(ids) + max_new_tokens > room:
        raise VariatorError(
            f"the prompt has {len(ids)} tokens and {max_new_tokens} are to be generated, but the model's "
            f"context is {room} tokens: shorten the prompt or lower --max-new-tokens"
        )
    return torch.tensor([ids], device=model.device)


def _summary(plugin: str | None, prompt_tokens: int, result: Generation) -> str:
    speed = "" if result.tokens_per_second is None else f", then {result.tokens_per_second:.1f} tokens/s"
    return (
        f"[plugin {plugin or DENSE}: {prompt_tokens} prompt tokens, first token after "
        f"{result.first_token_seconds:.2f} s{speed}; KV cache {result.cache.bytes / 2**20:.2f} MiB, "
        f"dense {result.cache.dense_bytes / 2**20:.2f} MiB]"
    )


if __name__ == "__main__":
    cli.run(main)
