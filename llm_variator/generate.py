"""`python -m llm_variator.generate`: continue a prompt with a plugin, or compare plugins with the base model.

The text goes to stdout and everything else to stderr, so that the output can be piped on. `--compare` prints
a table and the texts.
"""

from __future__ import annotations

import argparse
import codecs
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer, set_seed

from llm_variator.cli import (
    Parser,
    add_quantize_flag,
    model_options,
    natural,
    natural_float,
    parse,
    positive_float,
    positive_int,
    run,
)
from llm_variator.errors import VariatorError
from llm_variator.measures.compare import DENSE, Generation, compare, generate, print_comparison
from llm_variator.measures.results import peak_memory_gib, write_result
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model, load_tokenizer, shipped_plugins
from llm_variator.sources.models.aliases import ALIASES


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input."""
    started = time.perf_counter()
    args = parse(build_parser(), argv)
    plugins = parse_plugins(args.plugin)
    _check_flags(args, plugins)
    prompt = read_prompt(args.prompt, args.prompt_file)
    tokenizer = load_tokenizer(args.model, stand_in=args.random_init)
    model = VariatorModel(_load(args))
    model.decoder_only("this command", "T5's generate is at hand in Python, through VariatorModel")
    for name, plugin in plugins.items():
        model.load_plugin(plugin, plugin_name=name)
    input_ids = encode(tokenizer, prompt, model, args.max_new_tokens, chat=args.chat)
    set_seed(args.seed)
    if args.compare:
        rows = compare(
            model, tokenizer, input_ids, max_new_tokens=args.max_new_tokens, repetitions=args.repetitions
        )
        print_comparison(rows, input_ids.shape[1], args.max_new_tokens)
        figures: dict[str, Any] = {"rows": [asdict(row) for row in rows]}
    else:
        model.set_plugin(next(iter(plugins), None))
        inner = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if args.stream else None
        result = generate(model, tokenizer, input_ids, args.max_new_tokens, inner=inner, **_sampling(args))
        if not args.stream:
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
    if args.json is not None:
        figures |= {"model": args.model, "prompt_tokens": input_ids.shape[1]}
        command = ["llm_variator.generate", *(sys.argv[1:] if argv is None else argv)]
        write_result(args.json, figures, command=command, seed=args.seed, started=started)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command line."""
    parser = Parser(
        prog="python -m llm_variator.generate",
        description="Continue a prompt with a compression plugin, or compare plugins with the dense model.",
    )
    parser.add_argument(
        "--model", default="smollm2-135m", help=f"alias ({', '.join(ALIASES)}), local folder or hub id"
    )
    parser.add_argument(
        "--plugin",
        nargs="+",
        action=_Plugins,
        default=[],
        metavar="[NAME=]PLUGIN",
        help=f"folder, hub id or shipped ({', '.join(shipped_plugins()) or 'none'}); several with --compare",
    )
    text = parser.add_argument_group("prompt", "Exactly one source; without a flag it is read from stdin.")
    text.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    text.add_argument("--prompt-file", metavar="FILE", help="a UTF-8 text file; - is stdin")
    text.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    output = parser.add_argument_group("output")
    output.add_argument("--max-new-tokens", type=positive_int, default=128, help="tokens to generate")
    output.add_argument("--stream", action="store_true", help="print the text while it is generated")
    output.add_argument(
        "--compare", action="store_true", help="greedy, dense against every plugin, as a table"
    )
    output.add_argument(
        "--repetitions",
        type=positive_int,
        default=5,
        help="with --compare: timings of the first token, interleaved",
    )
    output.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    sampling = parser.add_argument_group("sampling", "Greedy without any of these.")
    sampling.add_argument("--temperature", type=natural_float, help="0 is greedy")
    sampling.add_argument("--top-p", type=positive_float, help="sample from this much probability mass")
    sampling.add_argument("--top-k", type=positive_int, help="sample from this many tokens")
    sampling.add_argument("--seed", type=natural, default=0, help="of sampling and of --random-init")
    host = parser.add_argument_group("model")
    host.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    host.add_argument("--device", default="cpu", help="where to run, as in cpu or cuda:0")
    host.add_argument("--random-init", action="store_true", help="the model's shape with random weights")
    host.add_argument("--num-layers", type=positive_int, help="with --random-init: another depth")
    add_quantize_flag(host.add_argument)
    host.add_argument(
        "--device-map",
        choices=["auto"],
        help="spread the layers over all GPUs and the CPU's memory, in place of --device",
    )
    return parser


def _load(args: argparse.Namespace) -> PreTrainedModel:
    return load_model(args.model, device=args.device, device_map=args.device_map, **model_options(args))


class _Plugins(argparse.Action):
    """Collects repeated flags; the first one replaces what a recipe gave."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*(() if before is self.default else before or ()), *(values or ())])


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
        if name == DENSE:
            raise VariatorError(f"--plugin {value}: {DENSE!r} is the dense model; give another name=")
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


def _check_flags(args: argparse.Namespace, plugins: dict[str, str]) -> None:
    if args.compare:
        if not plugins:
            raise VariatorError("--compare needs something to compare with: add --plugin")
        if args.stream or _sampling(args):
            raise VariatorError(
                "--compare is greedy and prints its texts at the end: leave out --stream and sampling"
            )
    if args.top_p is not None and args.top_p > 1:
        raise VariatorError(f"--top-p is a share of the probability mass, at most 1, not {args.top_p}")
    if len(plugins) > 1 and not args.compare:
        raise VariatorError("several plugins need --compare; give one --plugin to generate with")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate` for the sampling flags; empty for greedy."""
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("temperature") == 0:
        return {}
    return {"do_sample": True, **given} if given else {}


def _summary(plugin: str | None, prompt_tokens: int, result: Generation) -> str:
    speed = "" if result.tokens_per_second is None else f", then {result.tokens_per_second:.1f} tokens/s"
    return (
        f"[plugin {plugin or DENSE}: {prompt_tokens} prompt tokens, first token after "
        f"{result.first_token_seconds:.2f} s{speed}; KV cache {result.cache.bytes / 2**20:.2f} MiB, "
        f"dense {result.cache.dense_bytes / 2**20:.2f} MiB]"
    )


if __name__ == "__main__":
    run(main)
