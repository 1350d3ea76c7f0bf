"""What is measured: one model, dense and with plugins of random weights, from the flags all benchmarks share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_variator import old_cli as cli
from llm_variator.config import VariatorConfig
from llm_variator.engine.hooks import architecture_of
from llm_variator.errors import VariatorError
from llm_variator.measures.timing import CLOCKS, Case, interleaved
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model

DENSE = "dense"
_RANDOM_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class Plugin:
    """Sites and ratio of a plugin to measure."""

    sites: tuple[str, ...]
    k: int

    def __str__(self) -> str:
        return f"{'+'.join(self.sites)} k={self.k}"


def plugin(text: str) -> Plugin:
    """`ffn,kv:2` -> sites ffn and kv at k=2; checked by building its configuration."""
    sites, colon, k = text.rpartition(":")
    try:
        if not colon:
            raise ValueError("no ratio")
        made = Plugin(cli.names(sites), int(k))
        VariatorConfig(k=made.k, sites=made.sites)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected sites and a ratio as in ffn,kv:2, got {text!r} ({error})"
        ) from None
    return made


def add_flags(parser: argparse.ArgumentParser, *, plugins: str, tokens: str = "", batches: str = "") -> None:
    """The flags of every benchmark; `plugins`, `tokens` and `batches` are defaults, empty: no such flag."""
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="alias, local folder or hub id")
    add("--random-init", action="store_true", help="random weights of the model's shape: no download")
    add("--num-layers", type=cli.positive_int, help="with --random-init: so many layers, to fit the memory")
    add("--dtype", help="float32, bfloat16 or float16 (default: the model's)")
    add("--device", help="where to run (default: cuda if there is one, else cpu)")
    add("--attention", help="transformers' attn_implementation, as in sdpa or eager (default: the model's)")
    add("--threads", type=cli.positive_int, help="CPU threads (default: torch's)")
    add("--seed", type=cli.natural, default=0, help="of random weights and tokens")
    add("--plugins", type=plugin, nargs="+", default=[plugin(text) for text in plugins.split()], metavar="SITES:K",
        help="what to measure beside dense")  # fmt: skip
    add("--r", type=cli.positive_int, default=64, help="bottleneck width")
    add("--dense-head", type=cli.natural, help="default: the configuration's")
    add("--dense-tail", type=cli.natural, help="default: the configuration's")
    if tokens:
        numbers = [int(word) for word in tokens.split()]
        add("--tokens", type=cli.positive_int, nargs="+", default=numbers, help="lengths to measure")
    if batches:
        numbers = [int(word) for word in batches.split()]
        add("--batch-sizes", type=cli.positive_int, nargs="+", default=numbers, help="rows at once")
    add("--repetitions", type=cli.positive_int, default=7, help="times that every case is timed, in turns")
    add("--clock", choices=tuple(CLOCKS), default="wall",
        help="cpu: processor time of this process, for a busy machine; not with a GPU")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="store the figures with command, versions and machine")
    add("--markdown", type=Path, metavar="FILE", help="store the table")
    add("--plot", type=Path, metavar="FILE", help="store a plot (needs matplotlib), as .svg or .png")


def _own_memory(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Copy the rows that logits are made of, in every case alike.

    Transformers cuts them out of the prompt as a view, which torch multiplies on a CPU in bf16 by way of a copy of all
    of the head's weights, seconds for LLaMA-7B. Dense would look slower than it has to be.
    """
    return (args[0].clone(memory_format=torch.contiguous_format),)


class Setting:
    """A loaded model with one plugin per `--plugins`, named as printed."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Load and attach; raises VariatorError where flags do not suit the model."""
        if args.threads:
            torch.set_num_threads(args.threads)
        self.args = args
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if args.clock == "cpu" and torch.device(self.device).type != "cpu":
            raise VariatorError("--clock cpu cannot time a GPU: leave it out")
        self.base: Any = load_model(
            args.model,
            dtype=args.dtype,
            device=self.device,
            random_init=args.random_init,
            num_layers=args.num_layers,
            seed=args.seed,
        )
        if args.attention:
            try:
                self.base.set_attn_implementation(args.attention)
            except (ValueError, ImportError) as error:
                raise VariatorError(f"--attention {args.attention}: {error}") from None
        if (head := self.base.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_own_memory)
        self.generator = torch.Generator().manual_seed(args.seed)
        self.attach()

    def attach(self) -> None:
        """Attach the plugins; after `model.unload()` once more, with other random weights."""
        self.model = VariatorModel(self.base)
        for spec in self.args.plugins:
            edges = {
                name: value
                for name in ("dense_head", "dense_tail")
                if (value := getattr(self.args, name)) is not None
            }
            config = VariatorConfig(k=spec.k, sites=spec.sites, r=self.args.r, **edges)
            self.randomise(self.model.add_plugin(str(spec), config))

    def randomise(self, made: nn.Module) -> None:
        """Small random weights in the model's dtype: a new plugin is full of zeros."""
        made.to(self.base.dtype)
        with torch.no_grad():
            for parameter in made.parameters():
                values = torch.randn(parameter.shape, generator=self.generator) * _RANDOM_SCALE
                parameter.copy_(values)

    def interleaved(self, cases: Mapping[str, Case], progress: Callable[[], None]) -> dict[str, list[float]]:
        """Time `cases` in turns, as often and by the clock that the flags say."""
        return interleaved(
            cases, self.args.repetitions, device=self.device, progress=progress, clock=self.args.clock
        )

    @property
    def names(self) -> list[str]:
        """The plugins' names."""
        return list(self.model.plugins)

    def config(self, name: str) -> VariatorConfig | None:
        """A plugin's configuration, None of the dense model."""
        return None if name == DENSE else self.model.plugins[name]

    def using(self, name: str) -> Callable[[], AbstractContextManager[Any]]:
        """For `Case.inside`: with the plugin `name`, or dense."""
        return lambda: self.model.use_plugin(None if name == DENSE else name)

    def ids(self, rows: int, tokens: int) -> Tensor:
        """(rows, tokens) random tokens."""
        size = (rows, tokens)
        return torch.randint(3, self.base.config.vocab_size, size, generator=self.generator).to(self.device)

    def reader(self) -> Any:
        """The module that reads the prompt of an encoder."""
        return architecture_of(self.base).stack(self.base)

    def facts(self) -> dict[str, Any]:
        """What the figures were measured on."""
        config = self.base.config
        return {
            "model": self.args.model,
            "random_weights": self.args.random_init,
            "layers": self.model.signature.num_layers,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": torch.device(self.device).type,
            "threads": torch.get_num_threads(),
            "attention": config._attn_implementation,
            "clock": self.args.clock,
            "repetitions": self.args.repetitions,
        }
