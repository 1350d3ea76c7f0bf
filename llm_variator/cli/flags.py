"""Groups of flags that several commands have in common: dataclasses for their settings to inherit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from llm_variator.cli import REQUIRED, flag, spelled
from llm_variator.cli.values import (
    Device,
    JsonLists,
    JsonMapping,
    Layers,
    Names,
    OutputFile,
    PositiveInt,
    Ratio,
    Seed,
    Whole,
    Word,
)
from llm_variator.config import VariatorConfig


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Base model."""

    model: str = flag(REQUIRED, "alias, local folder or hub id")
    dtype: str | None = flag(None, "float32, bfloat16 or float16 (default: as stored)")
    random_init: bool = flag(False, "the model's shape with random weights; no download")
    num_layers: PositiveInt | None = flag(None, "with --random-init: this many layers")
    quantize: Literal["nf4", "int8"] | None = flag(
        None, "the base's matrices in 4 bits (NF4) or 8 (int8), by bitsandbytes; plugins stay as they are"
    )
    device: Device = flag("cpu", "where to run, as in cpu or cuda:0")
    seed: Seed = flag(0, "of random weights and of everything else that is drawn")

    def loading(self) -> dict[str, Any]:
        """Keyword arguments of `loading.load_model`, all but `device`."""
        return {
            name: getattr(self, name) for name in ("dtype", "random_init", "num_layers", "seed", "quantize")
        }


@dataclass(frozen=True, kw_only=True)
class LocalData:
    """Local copies."""

    data_dir: Path | None = flag(
        None, "folder of local data sets NAME/SPLIT.parquet (default: $VARIATOR_DATA)", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class Text(LocalData):
    """Text that is read."""

    data: str = flag(REQUIRED, "text, named as in llm_variator.train", metavar="SOURCE")
    windows: PositiveInt = flag(16, "stretches of text, evenly spread over the data")
    batch_size: PositiveInt = flag(4, "windows in one forward pass")


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Result."""

    json: OutputFile | None = flag(
        None, "store the figures with command, versions and machine", metavar="FILE"
    )


PRESETS: dict[str, Callable[..., VariatorConfig]] = {"paper": VariatorConfig.paper}


@dataclass(frozen=True, kw_only=True)
class PluginConfig:
    """Plugin: what is not given keeps VariatorConfig's (or the preset's) default."""

    preset: Literal["paper"] | None = flag(None, "a named configuration; the flags below override its fields")
    k: Ratio | None = flag(None, "compression ratio, one for all sites or one each: 2 or ffn=2,kv=4")
    sites: Names | None = flag(None, "where to compress: some of ffn,attention,kv, and for T5 cross")
    r: Whole | None = flag(None, "bottleneck width of the decompressor")
    compressor: Word | None = flag(
        None,
        "how a group becomes one vector: weighted or mean; for site kv of a decoder also select: each head keeps "
        "single keys and values. One for all sites or one each: ffn=weighted,kv=select",
    )
    decompressor: str | None = flag(None, "how one vector becomes k again: adapter or copy")
    activation: str | None = flag(None, "in the adapter: identity (paper) or tanh (its released code)")
    layers: Layers | None = flag(None, "layers that get a plugin, as in 0-5,8 (default: all)")
    k_per_layer: JsonMapping | None = flag(
        None,
        "per site one ratio for every layer, 1 leaving the layer dense: '{\"ffn\": [1, 2, 2, 4]}'",
        metavar="JSON",
    )
    k_per_head: JsonLists | None = flag(
        None,
        "with select: for every layer one ratio per KV head: '[[4, 1], [2, 64]]' (default: by --keep, or --k for all)",
        metavar="JSON",
    )
    block: Whole | None = flag(None, "with select: neighbouring tokens among which a head chooses")
    score_fits: Whole | None = flag(None, "with select: linear maps in a head's score")
    dense_head: Whole | None = flag(None, "first prompt tokens kept uncompressed")
    dense_tail: Whole | None = flag(None, "least number of last prompt tokens kept uncompressed")
    decode_block: Whole | None = flag(
        None, "compress generated tokens once so many are older than the dense tail"
    )

    def _plugin_flags(self) -> dict[str, Any]:
        own = {field.name: getattr(self, field.name) for field in fields(PluginConfig)}
        return {name: value for name, value in own.items() if value is not None}

    def plugin_flags_given(self) -> list[str]:
        """The flags of this group (with their dashes) that the user or the recipe gave."""
        return [spelled(name) for name in self._plugin_flags()]

    def plugin_config(self) -> VariatorConfig:
        """The configuration that this group describes.

        Raises:
            VariatorError: a field has a wrong value.
        """
        given = self._plugin_flags()
        preset = given.pop("preset", None)
        return PRESETS[preset](**given) if preset else VariatorConfig(**given)
