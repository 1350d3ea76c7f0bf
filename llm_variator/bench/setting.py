"""What is measured: one model, dense and with plugins, new or saved, from the flags all benchmarks share."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from llm_variator.bench.card import Card
from llm_variator.cli import flag, flags
from llm_variator.cli.values import Device, Natural, OutputFile, OutputPlot, PositiveInt, names
from llm_variator.config import VariatorConfig
from llm_variator.engine.hooks import architecture_of
from llm_variator.engine.plan import kv_heads
from llm_variator.errors import VariatorError
from llm_variator.generate import parse_plugins
from llm_variator.measures.timing import CLOCKS, Case, interleaved, own_memory, timed
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model
from llm_variator.sources.models.plugins import plugin_folder, resolve_plugin
from llm_variator.train.shares import Budget

DENSE = "dense"
_RANDOM_SCALE = 0.02


@dataclasses.dataclass(frozen=True)
class Plugin:
    """Sites and ratio of a plugin to measure, of random weights, or where one is saved."""

    sites: tuple[str, ...] = ()
    k: int = 1
    keep: float | None = None
    """Share of keys and values that heads of unlike ratios keep together; None: tokens are merged."""
    saved: str | None = None
    """A folder or a name, which says all the rest."""
    name: str = ""
    """Of a saved one, as printed."""

    def __str__(self) -> str:
        if self.saved is not None:
            return self.name
        return (
            f"{'+'.join(self.sites)} k={self.k}"
            if self.keep is None
            else f"kv keeps {round(1000 * self.keep)} of 1000"
        )

    def config(self, model: VariatorModel, settings: Settings) -> VariatorConfig:
        """For the model that is measured."""
        ends = {name: getattr(settings, name) for name in ("dense_head", "dense_tail")}
        given = {name: value for name, value in ends.items() if value is not None}
        config = VariatorConfig(k=self.k, sites=self.sites, r=settings.r, **given)
        if self.keep is None:
            return config
        model.decoder_only(str(self), "an encoder keeps no KV cache")
        config = dataclasses.replace(config, compressor="select")
        layers, heads = model.signature.num_layers, kv_heads(model.config)
        ends_of = config.resolved(model.signature, decoder=True).ends
        # as unlike as those of trained models, from every token to one in a block, in no order
        order = torch.randperm(layers * heads, generator=torch.Generator().manual_seed(settings.seed))
        needs = config.block ** -(2 * order / max(1, len(order) - 1)).view(layers, heads)
        costs = needs[..., None] * 2 ** torch.arange(
            config.block.bit_length()
        )  # so k falls as the root of the need
        ratios = Budget(self.keep, settings.tokens, ends=ends_of, block=config.block).ratios(costs)
        return dataclasses.replace(config, k_per_head=ratios.tolist())


def plugin(text: str) -> Plugin:
    """`ffn,kv:2` -> sites ffn and kv at k=2, `kept:0.25` -> a quarter of all keys and values, `runs/k2` -> that one."""
    if "/" in text:
        ((name, saved),) = parse_plugins([text]).items()
        resolve_plugin(saved)
        return Plugin(saved=saved, name=name)
    sites, colon, number = text.rpartition(":")
    try:
        if not colon:
            raise ValueError("no ratio")
        if sites == "kept":
            if not 0 < float(number) <= 1:
                raise ValueError("a share lies between 0 and 1")
            return Plugin(("kv",), 1, float(number))
        made = Plugin(names(sites), int(number))
        VariatorConfig(k=made.k, sites=made.sites)
    except ValueError as error:
        raise VariatorError(
            "--plugins: expected sites and a ratio as in ffn,kv:2, a share as in kept:0.25, or a saved plugin as in "
            f"runs/k2, got {text!r} ({error})"
        ) from None
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batches:
    """Rows."""

    batch_sizes: tuple[PositiveInt, ...] = flag((1,), "rows at once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plotted:
    """Times over the dense ones, by length."""

    plot: OutputPlot | None = flag(None, "store a plot (needs matplotlib), as .svg or .png", metavar="FILE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(flags.Stored, flags.BaseModel):
    """What is measured, and how."""

    model: str = "smollm2-135m"
    device: Device = flag("", "where to run (default: cuda if there is one, else cpu)")
    attention: str | None = flag(
        None, "transformers' attn_implementation, as in sdpa or eager (default: the model's)"
    )
    threads: PositiveInt | None = flag(None, "CPU threads (default: torch's)")
    plugins: tuple[str, ...] = flag(
        ("ffn:2",),
        "what to measure beside dense: SITES:K merges, kept:SHARE keeps keys and values; or a saved plugin, as in "
        "smollm2-135m/k2 or NAME=runs/k2",
        metavar="PLUGIN",
    )
    r: PositiveInt = flag(64, "bottleneck width of plugins that are not saved")
    dense_head: Natural | None = flag(None, "their first tokens kept (default: the configuration's)")
    dense_tail: Natural | None = flag(None, "their last tokens kept (default: the configuration's)")
    tokens: tuple[PositiveInt, ...] = flag((512,), "lengths to measure")
    repetitions: PositiveInt = flag(7, "times that every case is timed, in turns")
    clock: str = flag(
        "wall",
        "cpu: processor time of this process, for a busy machine; not with a GPU",
        choices=tuple(CLOCKS),
    )
    card: bool = flag(
        False,
        "measure the device's own rates first (a large product, a large copy); card ms: the least that operations or "
        "bytes then take, of card: its share of the time",
    )
    markdown: OutputFile | None = flag(None, "store the table", metavar="FILE")

    def __post_init__(self) -> None:
        found = self.measured()
        parse_plugins([f"{each.name}={each.saved}" for each in found if each.saved])  # none twice
        ends = [name for name in ("dense_head", "dense_tail") if getattr(self, name) is not None]
        if ends and all(each.saved for each in found):
            given = ", ".join(f"--{name.replace('_', '-')}" for name in ends)
            raise VariatorError(f"saved plugins have their own dense ends: leave out {given}")

    def measured(self) -> list[Plugin]:
        """What `--plugins` says; raises VariatorError where it says nothing."""
        return [plugin(text) for text in self.plugins]

    def one_plugin(self) -> None:
        """For benchmarks of one plugin: raises VariatorError where `--plugins` names more."""
        if len(self.plugins) > 1:
            raise VariatorError(f"bench {self.command()} takes one plugin, not {' '.join(self.plugins)}")

    @classmethod
    def command(cls) -> str:
        """The benchmark's name."""
        return cls.__name__.lower()

    @classmethod
    def note(cls) -> str:
        """What stands under the table: the docstring after its first line."""
        return " ".join((cls.__doc__ or "").split("\n", 1)[1].split())


S_co = TypeVar("S_co", bound=Settings, covariant=True)


class Setting(Generic[S_co]):
    """A loaded model with one plugin per `--plugins`, named as printed."""

    def __init__(self, settings: S_co) -> None:
        """Load and attach; raises VariatorError where flags do not suit the model."""
        self._saved = {
            str(spec): plugin_folder(spec.saved) for spec in settings.measured() if spec.saved is not None
        }
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if settings.clock == "cpu" and not self.device.startswith("cpu"):
            raise VariatorError("--clock cpu cannot time a GPU: leave it out, or give --device cpu")
        self.base: Any = load_model(settings.model, device=self.device, **settings.loading())
        if settings.attention:
            try:
                self.base.set_attn_implementation(settings.attention)
            except (ValueError, ImportError) as error:
                raise VariatorError(f"--attention {settings.attention}: {error}") from None
        if (head := self.base.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(own_memory)
        self.card = Card.measured(self.device, self.base.dtype) if settings.card else None
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.on_device = torch.Generator(self.device).manual_seed(settings.seed)
        self.peaks: dict[str, float] = {}
        """GiB that each case held on a GPU at most, in the last `interleaved`."""
        self.attach()

    def attach(self) -> None:
        """Attach the plugins; after `model.unload()` once more, with other random weights."""
        self.model = VariatorModel(self.base)
        for spec in self.settings.measured():
            if spec.saved is not None:
                self.model.load_plugin(self._saved[str(spec)], str(spec))
                continue
            self.randomise(self.model.add_plugin(str(spec), spec.config(self.model, self.settings)))

    def randomise(self, made: nn.Module) -> None:
        """Small random weights in the model's dtype: a new plugin is full of zeros."""
        made.to(self.base.dtype)
        with torch.no_grad():
            for parameter in made.parameters():
                values = torch.randn(parameter.shape, generator=self.generator) * _RANDOM_SCALE
                parameter.copy_(values)

    def interleaved(self, cases: Mapping[str, Case], progress: Callable[[], None]) -> dict[str, list[float]]:
        """Time `cases` in turns, as often and by the clock that the flags say."""
        self.peaks = {}
        if torch.device(self.device).type == "cuda":
            cases = {name: self._watched(name, case) for name, case in cases.items()}
        return interleaved(
            cases, self.settings.repetitions, device=self.device, progress=progress, clock=self.settings.clock
        )

    def _watched(self, name: str, case: Case) -> Case:
        """The same case, whose peak of memory is remembered."""

        def prepare() -> Any:
            state = case.prepare()
            torch.cuda.reset_peak_memory_stats(self.device)
            return state

        def after(result: Any) -> None:
            self.peaks[name] = max(
                self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device) / 2**30
            )
            case.after(result)

        return dataclasses.replace(case, prepare=prepare, after=after)

    def timed(self, seconds: Mapping[str, list[float]], name: str, reference: str) -> dict[str, float]:
        """`timing.timed`, with the peak of memory on a GPU."""
        peak = {"peak_gib": self.peaks[name]} if name in self.peaks else {}
        return timed(seconds, name, reference) | peak

    def each_size(self, measure: Callable[[int, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of `measure(tokens, rows)` at every length and batch size; one that says so where memory ends."""
        sizes = getattr(self.settings, "batch_sizes", (1,))
        found: list[dict[str, Any]] = []
        for tokens in self.settings.tokens:
            for batch in sizes:
                try:
                    found += measure(tokens, batch)
                except torch.OutOfMemoryError:
                    found.append({"case": "out of memory", "tokens": tokens, "batch": batch})
                gc.collect()  # what a failed pass held, and caches that refer to each other
                if torch.device(self.device).type == "cuda":
                    torch.cuda.empty_cache()
        return found

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
            "model": self.settings.model,
            "random_weights": self.settings.random_init,
            "layers": self.model.signature.num_layers,
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": torch.device(self.device).type,
            "threads": torch.get_num_threads(),
            "attention": config._attn_implementation,
            "clock": self.settings.clock,
            "repetitions": self.settings.repetitions,
            **({} if self.card is None else {"card": dataclasses.asdict(self.card)}),
        }
