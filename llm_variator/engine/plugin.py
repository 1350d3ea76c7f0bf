"""A compression plugin: the trainable layers of all its sites, and their files.

Every parameter of a `CompressionPlugin` is trained and saved, and nothing else is.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_variator.config import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, BaseSignature, VariatorConfig
from llm_variator.engine.files import write_atomically
from llm_variator.engine.layers import HiddenCompressor, HiddenDecompressor, KeyScore
from llm_variator.engine.plan import Plan
from llm_variator.errors import VariatorError

logger = logging.getLogger(__name__)

_SERIALS = itertools.count()

_SETTINGS = "settings"  # under which a weights file names, by hash, the config it was saved with


def weights_digest(embedding: torch.Tensor) -> str:
    """Short hash of the first input embeddings (vocabulary, d), the same in fp32 and bf16; "" if not loaded."""
    if embedding.device.type == "meta" or not embedding.is_floating_point():
        return ""
    sample = embedding.detach()[:64].to("cpu", torch.bfloat16).contiguous().view(torch.int16)
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]


def base_signature(host: Any, num_layers: int) -> BaseSignature:
    """What a plugin stores about its base."""
    config = host.config
    name = getattr(config, "_name_or_path", "") or config.model_type
    if Path(name).is_absolute():
        name = Path(name).name
    digest = weights_digest(host.get_input_embeddings().weight)
    return BaseSignature(name, config.model_type, config.hidden_size, num_layers, digest)


def warn_if_other_weights(folder: Path, base: BaseSignature, digest: str) -> None:
    """Warn that the plugin in `folder` was trained on other weights than those of `digest`."""
    if base.weights and digest not in ("", base.weights):
        logger.warning(
            "%s was trained on %s with other weights than this model's; expect lower quality unless this "
            "model is fine-tuned from it",
            folder,
            base.name,
        )


class SiteLayers(nn.Module):
    """The layers of one site in one layer of the model. "kv" and "cross" restore nothing: queries stay per token."""

    def __init__(self, config: VariatorConfig, site: str, dim: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.compressor = HiddenCompressor(dim, k, mean=config.compressor_of(site) == "mean")
        if site not in ("kv", "cross"):
            self.decompressor = HiddenDecompressor(
                dim, config.r, activation=config.activation, copy=config.decompressor == "copy"
            )


class SelectLayers(nn.Module):
    """What site "kv" has in one layer where it keeps keys and values: the score that decides, and how many."""

    def __init__(self, config: VariatorConfig, dim: int, ratios: tuple[int, ...]) -> None:
        super().__init__()
        self.ratios = ratios
        """Of each KV head."""
        self.block = config.block
        self.serial = next(_SERIALS)
        """No other has it in this process: caches remember whose scores they hold."""
        self.score = KeyScore(dim, len(ratios), config.score_fits)


class CompressionPlugin(nn.Module):
    """All layers of one plugin; the parameters are named `<site>.<layer>.…`.

    Attributes:
        plan: what it does to a prompt of its base; `config` is the configuration in it.
        sites: (site, layer) -> its trainable layers, where vectors are merged.
        selects: layer -> its trainable layer, where keys and values are kept.
        cache_layers: the layers whose KV cache holds fewer entries than tokens.
    """

    def __init__(self, plan: Plan, dim: int) -> None:
        """`plan` says what is attached where; `dim` is the hidden width.

        Raises:
            VariatorError: its weights would not fit into the free memory.
        """
        super().__init__()
        self.plan, self.config = plan, plan.config
        config, ratios = plan.config, plan.ratios
        _check_size(plan, dim)
        for site, layers in ratios.items():
            self.add_module(
                site, nn.ModuleDict({str(i): SiteLayers(config, site, dim, k) for i, k in layers.items()})
            )
        if plan.selected:
            scores = {str(i): SelectLayers(config, dim, heads) for i, heads in plan.selected.items()}
            self.add_module("kv", nn.ModuleDict(scores))
        # plain lookups: hooks ask at every layer of every pass
        self.sites = {(site, i): self._site(site, i) for site in ratios for i in ratios[site]}
        self.selects = {i: self._select(i) for i in plan.selected}
        merging = {layer for site, layer in self.sites if site in ("kv", "attention")}
        self.cache_layers = sorted(merging | self.selects.keys())

    def at(self, site: str, layer: int) -> SiteLayers | None:
        """The layers of `site` in the model's layer `layer`; None where it stays dense."""
        return self.sites.get((site, layer))

    def _site(self, site: str, layer: int) -> SiteLayers:
        module = self.get_submodule(f"{site}.{layer}")
        assert isinstance(module, SiteLayers)
        return module

    def _select(self, layer: int) -> SelectLayers:
        module = self.get_submodule(f"kv.{layer}")
        assert isinstance(module, SelectLayers)
        return module

    def save(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, card: str | None = None
    ) -> None:
        """Write weights, config and model card into `folder`; each file appears whole or not at all."""
        folder = Path(folder)
        weights = dict(self.state_dict())
        for place, layer in self.named_modules():
            if dtype == torch.float16 and isinstance(layer, HiddenDecompressor):
                balanced = copy.deepcopy(layer).half().state_dict()
                weights |= {f"{place}.{name}": value for name, value in balanced.items()}
        weights = {
            name: value.detach().to("cpu", dtype or value.dtype).contiguous()
            for name, value in weights.items()
        }
        if name := _no_number_in(weights):
            raise VariatorError(
                f"{name} has values that {str(weights[name].dtype).removeprefix('torch.')} does not hold, or that "
                "training has spoiled: save in bfloat16 or float32, or train at a lower rate"
            )
        settings = json.dumps(self.config.to_dict(), indent=2) + "\n"
        metadata = {"format": "pt", _SETTINGS: _text_digest(settings)}
        # the config comes last: a folder that has one is complete
        write_atomically(folder / WEIGHTS_FILE, lambda file: save_file(weights, file, metadata=metadata))
        write_atomically(folder / CARD_FILE, card or self.card())
        write_atomically(folder / CONFIG_FILE, settings)

    def balance(self) -> None:
        """`HiddenDecompressor.balance` of every site: the same function, whose weights float16 holds."""
        for layer in self.modules():
            if isinstance(layer, HiddenDecompressor):
                layer.balance()

    def check_numbers(self, dtype: torch.dtype) -> None:
        """Raise VariatorError if weights are infinite, or would be in a pass that computes in `dtype`."""
        if name := _no_number_in({name: value.to(dtype) for name, value in self.state_dict().items()}):
            raise VariatorError(
                f"{name} has values that float16 does not hold: load the plugin onto a base in bfloat16 or float32"
            )

    def load_weights(self, folder: Path) -> None:
        """Strictly load `folder`'s weights: every key, shape and dtype must fit, or nothing changes."""
        file = folder / WEIGHTS_FILE
        own = self.state_dict()
        if not file.is_file():
            for other in (other for end in ("*.bin", "*.pt", "*.pth", "*.pkl") for other in folder.glob(end)):
                raise VariatorError(
                    f"{other} is a pickle, which could run code: plugins are read from {WEIGHTS_FILE} alone; have it "
                    "saved again with save_pretrained"
                )
            raise VariatorError(
                f"{file} not found: the plugin folder is incomplete; save or download it again"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                read = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
                settings = (opened.metadata() or {}).get(_SETTINGS)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise VariatorError(
                f"{file} is not a whole safetensors file ({error}); save or download the plugin again"
            ) from None
        if missing := sorted(own.keys() - read.keys()):
            raise VariatorError(
                f"{file} lacks {_some(missing)}; it does not fit its {CONFIG_FILE}, save it again"
            )
        if surplus := sorted(read.keys() - own.keys()):
            raise VariatorError(
                f"{file} has surplus {_some(surplus)}; it does not fit its {CONFIG_FILE}, save it again"
            )
        for name, value in read.items():
            if value.shape != own[name].shape:
                raise VariatorError(
                    f"{file}: {name} has shape {tuple(value.shape)}, expected {tuple(own[name].shape)}; "
                    f"it does not fit its {CONFIG_FILE} or this base model"
                )
            if not value.is_floating_point():
                raise VariatorError(
                    f"{file}: {name} is {value.dtype}, expected floating point; save it again"
                )
        if name := _no_number_in(read):
            raise VariatorError(
                f"{file}: {name} holds values that are no numbers: have it saved again, in bfloat16 or float32"
            )
        if settings not in (None, _text_digest((folder / CONFIG_FILE).read_text(encoding="utf-8"))):
            logger.warning(
                "%s is not the %s that these weights were saved with: it was edited, or a save over another plugin "
                "was interrupted",
                folder / CONFIG_FILE,
                CONFIG_FILE,
            )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(read[name])

    def card(self, facts: Mapping[str, Any] | None = None, *, source: str = "path/to/this/folder") -> str:
        """The model card (README.md): what this is, how to load it from `source`, how it was made (`facts`)."""
        config = self.config
        base = config.base_model or "its base model"
        count = sum(parameter.numel() for parameter in self.parameters())
        settings: dict[str, Any] = {"sites": ", ".join(config.sites)}
        if self.sites:
            settings |= {"k": config.k, "r": config.r}
        if self.selects:
            settings |= {"keys and values": f"kept, each head its own, in blocks of {config.block}"}
            settings |= {"ratios of heads": _ratios_of_heads(self.plan.selected.values())}
        settings |= {"dense head": config.dense_head, "dense tail": config.dense_tail}
        rows = [*settings.items(), ("parameters", f"{count:,}"), *(facts or {}).items()]
        table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
        facts_of_it = {"library_name": "llm_variator", "base_model": base}
        head = yaml.safe_dump({**facts_of_it, "tags": ["variator", "compression-plugin"]}, sort_keys=False)
        return (
            f"---\n{head}---\n\n# Compression plugin for {' '.join(base.split())}\n\n"
            f"{self._what_it_does()}; the base model is untouched.\n\n"
            "```python\nfrom llm_variator import VariatorModel\n\n"
            f"model = VariatorModel.from_pretrained({json.dumps(base)}, {json.dumps(source)})\n```\n\n"
            f"| | |\n|---|---|\n{table}\n"
        )

    def _what_it_does(self) -> str:
        keeps = "keeps of a long prompt those keys and values that later tokens will read"
        merges = "merges neighbouring prompt vectors so that a long prompt costs less compute"
        if self.cache_layers and not self.selects:
            merges += " and KV cache"
        text = "; ".join([merges] * bool(self.sites) + [keeps] * bool(self.selects))
        return text[0].upper() + text[1:]


def _ratios_of_heads(layers: Iterable[tuple[int, ...]]) -> str:
    counts = Counter(k for heads in layers for k in heads)
    return ", ".join(
        f"{count} of 1/{k}" if k > 1 else f"{count} whole" for k, count in sorted(counts.items())
    )


def _check_size(plan: Plan, dim: int) -> None:
    """A slip in k must not end in the operating system's out-of-memory killer: W_c has k²d weights."""
    config = plan.config
    count = config.score_fits * (dim + 1) * sum(map(len, plan.selected.values()))
    for site, layers in plan.ratios.items():
        if config.compressor_of(site) == "weighted":
            count += sum(k * k * dim for k in layers.values())
        if config.decompressor == "adapter" and site not in ("kv", "cross"):
            count += 3 * config.r * dim * len(layers)
    if 4 * count > psutil.virtual_memory().available:
        raise VariatorError(
            f"the plugin would have {count:,} parameters, more than the free memory holds: choose a smaller k, r or "
            "score_fits"
        )


def _cell(value: Any) -> str:
    """A fact in a Markdown table."""
    return " ".join(str(value).replace("|", "\\|").split())


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _no_number_in(weights: Mapping[str, Tensor]) -> str | None:
    """The first of `weights` with an infinity or a NaN in it."""
    return next(
        (name for name, value in weights.items() if not value.is_meta and not value.isfinite().all()), None
    )
