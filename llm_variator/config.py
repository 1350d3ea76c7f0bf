"""What a plugin is: one frozen, self-validating dataclass and its JSON form."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_variator.errors import VariatorError

FORMAT_VERSION = 1
CONFIG_FILE = "variator_config.json"
WEIGHTS_FILE = "variator.safetensors"
CARD_FILE = "README.md"

QUANTISATIONS = ("nf4", "int8")
"""Of a frozen base, by bitsandbytes: 4 bits or 8."""
SITES = ("ffn", "attention", "kv", "cross")
COMPRESSORS = ("weighted", "mean", "select")
DECOMPRESSORS = ("adapter", "copy")
ACTIVATIONS = ("identity", "tanh")


@dataclasses.dataclass(frozen=True)
class BaseSignature:
    """Which base model a plugin belongs to; all but `name` and `weights` must match when it is loaded."""

    name: str
    model_type: str
    hidden_size: int
    num_layers: int
    weights: str = ""
    """Short hash of a few base weights: a difference (fine-tuned base) is worth a warning, not an error."""

    def __post_init__(self) -> None:
        for field in ("name", "model_type", "weights"):
            if not isinstance(getattr(self, field), str):
                raise VariatorError(f"base: {field} must be a text, got {getattr(self, field)!r}")
        for field in ("hidden_size", "num_layers"):
            _integer(f"base: {field}", getattr(self, field), least=1)


@dataclasses.dataclass(frozen=True)
class VariatorConfig:
    """Settings of one compression plugin. Wrong values raise a `VariatorError` (a `ValueError`)."""

    k: int | Mapping[str, int] = 2
    """Compression ratio: neighbouring vectors merged into one; an int, or one per site."""
    sites: Sequence[str] = ("ffn",)
    """Where to compress: "ffn", "kv" (keys and values only), "attention" (the whole self-attention), or, an
    extension of the paper for T5, "cross" (what the decoder reads of the encoder)."""
    r: int = 64
    """Bottleneck width of the decompressing adapter."""
    compressor: str | Mapping[str, str] = "weighted"
    """"weighted" (learned, paper section 3.2) or "mean"; for site "kv" of a decoder also "select": each head keeps
    single keys and values, chosen by a learned score. One for all sites, or one per site."""
    decompressor: str = "adapter"
    """"adapter" (paper section 3.2) or "copy" (each token of a group gets the group's output)."""
    activation: str = "identity"
    """Inside the adapter: "identity" as printed in the paper, "tanh" as in its released code."""
    layers: Sequence[int] | None = None
    """Layers that get the plugin; None: all."""
    k_per_layer: Mapping[str, Sequence[int]] | None = None
    """Per site one ratio for every layer of the model, overriding `k`; 1: that layer stays dense."""
    k_per_head: Sequence[Sequence[int]] | None = None
    """With "select": for every layer of the model one ratio per KV head, powers of two up to `block`; None: `k`."""
    block: int = 64
    """With "select": neighbouring tokens among which a head chooses its 1/k; a power of two."""
    score_fits: int = 1
    """With "select": linear maps per head whose log-sum-exp is the score of a token."""
    dense_head: int | None = None
    """First tokens of a sequence kept uncompressed (attention sinks); None: 4 for decoders, 0 for encoders."""
    dense_tail: int | None = None
    """Least number of last prompt tokens kept uncompressed; None: 1 for decoders, 0 for encoders."""
    decode_block: int | None = None
    """Generated tokens: compress them too, once so many are older than the last `dense_tail`; with "select" a multiple
    of `block`, behind at least the last `block`. None: stay dense."""
    base: BaseSignature | None = None
    """The base model this plugin was made for; filled in when the plugin is attached."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        def put(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        if self.format_version != FORMAT_VERSION:
            raise VariatorError(
                f"format_version {self.format_version!r} is not supported: this version of llm_variator reads "
                f"{FORMAT_VERSION}; install the version that wrote the plugin"
            )
        if not (self.base is None or isinstance(self.base, BaseSignature)):
            raise VariatorError(f"base must be a BaseSignature or None, got {self.base!r}")
        sites = (self.sites,) if isinstance(self.sites, str) else _items("sites", self.sites)
        put("sites", tuple(sorted(sites, key=lambda site: SITES.index(site) if site in SITES else -1)))
        for site in self.sites:
            _one_of("site", site, SITES)
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise VariatorError(
                f"sites must name each of {', '.join(SITES)} at most once, at least one; got {sites}"
            )
        if "kv" in self.sites and "attention" in self.sites:
            raise VariatorError(
                'sites "kv" and "attention" exclude each other: "attention" compresses K and V too'
            )

        if isinstance(self.k, Mapping):
            put("k", {site: self.k[site] for site in self._per_site("k", self.k, complete=True)})
            for site, k in self.k.items():
                _integer(f"k[{site!r}]", k, least=1)
        else:
            _integer("k", self.k, least=1)
        _integer("r", self.r, least=1)
        if isinstance(self.compressor, Mapping):
            named = self._per_site("compressor", self.compressor, complete=True)
            put("compressor", {site: self.compressor[site] for site in named})
        for site in self.sites:
            _one_of("compressor", self.compressor_of(site), COMPRESSORS)
        _one_of("decompressor", self.decompressor, DECOMPRESSORS)
        _one_of("activation", self.activation, ACTIVATIONS)

        if self.layers is not None:
            put("layers", _items("layers", self.layers))
            for layer in self.layers:
                _integer("layers", layer, least=0)
            if not self.layers or len(set(self.layers)) != len(self.layers):
                raise VariatorError(
                    f"layers must be distinct and at least one (or None for all), got {self.layers}"
                )
        if self.k_per_layer is not None:
            if not isinstance(self.k_per_layer, Mapping):
                raise VariatorError(
                    f'k_per_layer must map a site to a list, e.g. {{"ffn": [1, 2]}}; got {self.k_per_layer!r}'
                )
            given = self._per_site("k_per_layer", self.k_per_layer)
            put(
                "k_per_layer",
                {site: _items(f"k_per_layer[{site!r}]", self.k_per_layer[site]) for site in given},
            )
            if "cross" in given:
                raise VariatorError(
                    'k_per_layer has no "cross": all decoder layers read the same merged states'
                )
            for site, ratios in self.k_per_layer.items():
                for k in ratios:
                    _integer(f"k_per_layer[{site!r}]", k, least=1)
        self._check_select(put)
        for field, least in (("dense_head", 0), ("dense_tail", 0), ("decode_block", 1)):
            if getattr(self, field) is not None:
                _integer(field, getattr(self, field), least=least)
        if self.decode_block is not None and "ffn" in self.sites and len(self.sites) == 1:
            raise VariatorError('decode_block compresses the KV cache: it needs site "kv" or "attention"')

    def _check_select(self, put: Callable[[str, Any], None]) -> None:
        """Raise unless what belongs to "select" is there with it alone, and right."""
        for site in self.sites:
            if site != "kv" and self.compressor_of(site) == "select":
                raise VariatorError(
                    f'compressor "select" keeps keys and values: it is for site "kv", not {site!r}; give one per '
                    'site, as in compressor={"ffn": "weighted", "kv": "select"}'
                )
        for field in ("block", "score_fits"):
            _integer(field, getattr(self, field), least=1)
        if not self.selects:
            if self.k_per_head is not None:
                raise VariatorError('k_per_head belongs to compressor "select" of site "kv": leave it out')
            return
        if not _power_of_two(self.block):
            raise VariatorError(f"block must be a power of two, got {self.block}")
        if self.k_per_layer is not None and "kv" in self.k_per_layer:
            raise VariatorError(
                'with compressor "select" site "kv" has a ratio for every head: give k_per_head'
            )
        if self.decode_block is not None:
            _integer("decode_block", self.decode_block, least=1)
            if self.decode_block % self.block:
                raise VariatorError(
                    f'with compressor "select" whole blocks of generated tokens are reduced: decode_block must be a '
                    f"multiple of block ({self.block}), got {self.decode_block}"
                )
        if self.k_per_head is None:
            ratios = [self.k_of("kv")]
        else:
            rows = _items("k_per_head", self.k_per_head)
            put("k_per_head", tuple(_items("k_per_head", row) for row in rows))
            assert self.k_per_head is not None
            if not rows or len({len(row) for row in self.k_per_head}) != 1 or not self.k_per_head[0]:
                raise VariatorError(
                    "k_per_head must have one list per layer, each with one ratio per KV head"
                )
            ratios = [k for row in self.k_per_head for k in row]
        for k in ratios:
            _integer("k_per_head", k, least=1)
            if not _power_of_two(k) or k > self.block:
                raise VariatorError(
                    f'with compressor "select" a ratio must be a power of two up to block ({self.block}), got {k}'
                )

    @classmethod
    def paper(cls, k: int = 4, **overrides: Any) -> VariatorConfig:
        """What the paper describes, for decoders: FFN sites, no dense head, a dense tail of one token, every layer.

        Its encoders have no dense token at all: there, that is `VariatorConfig(k)`.
        """
        return cls(**{"k": k, "sites": ("ffn",), "dense_head": 0, "dense_tail": 1, **overrides})

    @classmethod
    def joined(cls, parts: Sequence[VariatorConfig], **given: Any) -> VariatorConfig:
        """One configuration that does at its sites what each of `parts`, which have different sites, does at its own.

        Args:
            parts: at least one.
            **given: dense ends, `decode_block` and `base` in place of what the parts say: in these they may differ.

        Raises:
            VariatorError: two parts have the same site, or differ in what one configuration says only once.
        """
        if not parts:
            raise VariatorError("there is nothing to join: name at least one plugin")
        free = ("dense_head", "dense_tail", "decode_block", "base")
        if wrong := sorted(given.keys() - set(free)):
            raise VariatorError(
                f"{', '.join(wrong)}: of joined plugins only {', '.join(free)} can be given anew"
            )
        sites = [site for part in parts for site in part.sites]
        if twice := sorted({site for site in sites if sites.count(site) > 1}):
            raise VariatorError(
                f"several of the plugins to join have site {', '.join(twice)}: leave out all but one"
            )

        def once(field: str, among: Sequence[VariatorConfig]) -> Any:
            """What the parts that use `field` say, its default where none does."""
            values = {getattr(part, field) for part in among}
            if len(values) > 1:
                both = " and ".join(sorted(map(str, values)))
                mend = f"give {field}" if field in free else "make one of them anew"
                raise VariatorError(f"plugins to join must have the same {field}, these have {both}: {mend}")
            return values.pop() if values else getattr(cls, field)

        restoring = [part for part in parts if {"ffn", "attention"} & set(part.sites)]
        caching = [part for part in parts if {"kv", "attention"} & set(part.sites)]
        selecting = [part for part in parts if part.selects]
        ratios = {site: k for part in parts for site, k in (part.k_per_layer or {}).items()}
        fields: dict[str, Any] = {
            "sites": sites,
            "k": {site: part.k_of(site) for part in parts for site in part.sites},
            "compressor": {site: part.compressor_of(site) for part in parts for site in part.sites},
            "k_per_layer": ratios or None,
        }
        for among, names in (
            (restoring, ("r", "decompressor", "activation")),
            (selecting, ("k_per_head", "block", "score_fits")),
            (caching, ("decode_block",)),
            (parts, ("layers", "dense_head", "dense_tail", "base", "format_version")),
        ):
            fields |= {name: once(name, among) for name in names if name not in given}
        return cls(**fields | given)

    @property
    def base_model(self) -> str | None:
        """Name of the base model; None until the plugin is attached to one."""
        return self.base.name if self.base else None

    def k_of(self, site: str) -> int:
        """The ratio of `site`, where no layer or head has its own."""
        return self.k[site] if isinstance(self.k, Mapping) else self.k

    def compressor_of(self, site: str) -> str:
        """How `site` compresses."""
        return self.compressor[site] if isinstance(self.compressor, Mapping) else self.compressor

    @property
    def selects(self) -> bool:
        """Whether site "kv" keeps keys and values instead of merging tokens."""
        return "kv" in self.sites and self.compressor_of("kv") == "select"

    def head_ratios(self, layer: int, kv_heads: int) -> tuple[int, ...] | None:
        """With "select": the ratio of each KV head in `layer`; None where that layer stays dense."""
        if not self.selects or (self.layers is not None and layer not in self.layers):
            return None
        ratios = (self.k_of("kv"),) * kv_heads if self.k_per_head is None else tuple(self.k_per_head[layer])
        return ratios if max(ratios) > 1 else None

    def ratio(self, site: str, layer: int) -> int | None:
        """Compression ratio of `site` in `layer`; None where that layer stays dense. "cross" has layer 0 alone.

        Of site "kv" with "select" there is no such ratio: see `head_ratios`.
        """
        if site == "kv" and self.selects:
            return None
        if site == "cross" and site in self.sites:
            return self.k_of(site) if layer == 0 else None
        if site not in self.sites or (self.layers is not None and layer not in self.layers):
            return None
        if self.k_per_layer is not None and site in self.k_per_layer:
            k = self.k_per_layer[site][layer]
            return k if k > 1 else None
        return self.k_of(site)

    def resolved(self, base: BaseSignature, *, decoder: bool) -> VariatorConfig:
        """This config with the defaults for `base` filled in. Raises where the two do not fit together."""
        if self.base is not None:
            for field in ("model_type", "hidden_size", "num_layers"):
                theirs, ours = getattr(self.base, field), getattr(base, field)
                if theirs != ours:
                    raise VariatorError(
                        f"the plugin was made for {self.base.name!r} ({field} {theirs}), but the model is "
                        f"{base.name!r} ({field} {ours}); load it onto its own base model"
                    )
        if self.layers is not None and max(self.layers) >= base.num_layers:
            raise VariatorError(
                f"layers names layer {max(self.layers)}, but {base.name!r} has {base.num_layers} layers"
            )
        for site, ratios in (self.k_per_layer or {}).items():
            if len(ratios) != base.num_layers:
                raise VariatorError(
                    f"k_per_layer[{site!r}] has {len(ratios)} entries, but {base.name!r} has {base.num_layers} layers"
                )
        if self.selects and not decoder:
            raise VariatorError(
                f'compressor "select" is for decoders, {base.name!r} is none: choose weighted or mean'
            )
        if self.k_per_head is not None and len(self.k_per_head) != base.num_layers:
            raise VariatorError(
                f"k_per_head has {len(self.k_per_head)} layers, but {base.name!r} has {base.num_layers}"
            )
        if self.decode_block is not None and not decoder:
            raise VariatorError(f"decode_block is for decoders, {base.name!r} is none: leave it out")
        default_head, default_tail = (4, 1) if decoder else (0, 0)
        return dataclasses.replace(
            self,
            dense_head=default_head if self.dense_head is None else self.dense_head,
            dense_tail=default_tail if self.dense_tail is None else self.dense_tail,
            base=self.base or base,
        )

    @property
    def ends(self) -> tuple[int, int]:
        """Dense tokens at both ends of a prompt, head and tail; of a `resolved` configuration."""
        assert self.dense_head is not None, "resolve the configuration first"
        assert self.dense_tail is not None
        return self.dense_head, self.dense_tail

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is the inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VariatorConfig:
        """Strict inverse of `to_dict`: unknown keys raise."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(map(str, set(values) - known)):
            raise VariatorError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        values = dict(values)
        if values.get("base") is not None:
            if not isinstance(values["base"], Mapping):
                raise VariatorError(f"base must hold a base model's signature, got {values['base']!r}")
            try:
                values["base"] = BaseSignature(**values["base"])
            except TypeError as error:
                raise VariatorError(f"base: {error}") from None
        return cls(**values)

    @classmethod
    def from_json(cls, file: Path) -> VariatorConfig:
        """Read a `variator_config.json`; errors name the file."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise VariatorError(f"{file} not found: not a plugin folder") from None
        except (OSError, ValueError, RecursionError) as error:
            raise VariatorError(
                f"{file} is not readable JSON ({error}); save or download the plugin again"
            ) from None
        if not isinstance(values, dict):
            raise VariatorError(f"{file} must hold a JSON object")
        try:
            return cls.from_dict(values)
        except VariatorError as error:
            raise VariatorError(f"{file}: {error}") from None

    def _per_site(self, field: str, values: Mapping[str, Any], complete: bool = False) -> list[str]:
        if (surplus := set(values) - set(self.sites)) or (complete and set(values) != set(self.sites)):
            got = ", ".join(map(str, surplus or values))
            raise VariatorError(f"{field} is given per site and must name {', '.join(self.sites)}; got {got}")
        return [site for site in self.sites if site in values]


def _items(field: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise VariatorError(f"{field} must be a list, got {values!r}")
    return tuple(values)


def _power_of_two(value: int) -> bool:
    return value & (value - 1) == 0


def _integer(field: str, value: Any, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise VariatorError(f"{field} must be an integer >= {least}, got {value!r}")


def _one_of(field: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise VariatorError(f"{field} must be one of {', '.join(choices)}; got {value!r}")
