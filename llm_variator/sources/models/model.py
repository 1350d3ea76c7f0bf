"""Base models: pretrained, with a LoRA merged in, or of a shape with random weights."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from llm_variator.config import QUANTISATIONS
from llm_variator.errors import VariatorError
from llm_variator.sources.models import cpu
from llm_variator.sources.models.aliases import ALIASES
from llm_variator.sources.models.configuration import (
    adapted_base,
    holds_adapter,
    load_config,
    peft,
    read_config,
)
from llm_variator.sources.models.names import (
    LOAD_ERRORS,
    base_name,
    checked_name,
    load_error,
    local_only,
    local_path,
    reason,
    source_of,
)
from llm_variator.sources.models.quantisation import keep_differentiable, quantisation_config, quantise
from llm_variator.sources.models.smollm2 import no_progress_bars

logger = logging.getLogger(__name__)

# From so many parameters on, random weights repeat one block of numbers, of prime length so that no two rows are equal.
# Files of so many bytes load in seconds.
_LARGE = 10**9
_BLOCK = 16_777_259

# Modules of a classification head, with what some checkpoints leave out before it.
_HEADS = ("classifier", "score", "classification_head", "bert.pooler")


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    random_init: bool = False,
    num_layers: int | None = None,
    num_labels: int | None = None,
    seed: int = 0,
    quantize: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a base model in evaluation mode.

    Args:
        name: alias, local folder or hub id; a folder may hold a LoRA adapter, which is merged into its base.
        dtype: dtype of the weights, or its name; None keeps the checkpoint's (for `random_init` the alias's:
            bf16 from a billion parameters on, fp32 below).
        device: where the weights end up.
        random_init: build the shape with random weights, made directly in `dtype` on `device`. An alias or
            a folder needs no network for it, and a folder needs no more than its config.json.
        num_layers: with `random_init`, the number of layers (of encoder and decoder each).
        num_labels: load it as a classifier of so many labels; a head that the checkpoint lacks is new.
        seed: seed of all new weights; the global random state is left as it was.
        quantize: "nf4" or "int8": matrices of the layers quantised by bitsandbytes, `dtype` for the rest.
        device_map: "auto" spreads a pretrained model's layers over the GPUs and the memory of the CPU, for
            inference, in place of `device`; or a mapping of modules to devices, as transformers takes it.

    Raises:
        VariatorError: nothing can be loaded from this name, or an argument is wrong.
    """
    name = checked_name(name)
    torch_dtype = parse_dtype(dtype)
    torch_device = _parse_device(device)
    if num_layers is not None and not random_init:
        raise VariatorError("num_layers changes the shape, so it needs random weights: add --random-init")
    if quantize is not None and quantize not in QUANTISATIONS:
        raise VariatorError(f"unknown quantisation {quantize!r}: use one of {', '.join(QUANTISATIONS)}")
    if device_map is not None and (random_init or holds_adapter(name)):
        raise VariatorError(
            "device_map is for pretrained models: give a device instead, or merge the LoRA first"
        )
    if random_init or holds_adapter(name):
        if random_init:
            model = _random_model(name, torch_dtype, torch_device, num_layers, num_labels, seed)
        else:
            model = _with_adapter(name, torch_dtype, num_labels, seed)
        if quantize is not None:
            quantise(model, quantize, torch_device)
        elif random_init:  # what a LoRA belongs to has been loaded here already
            _warn_of_slow_products(model)
        return model.to(torch_device)  # type: ignore[arg-type]
    source = source_of(name)
    model = _pretrained(
        name,
        source,
        torch_dtype,
        num_labels,
        seed,
        quantize,
        torch_device if device_map is None else device_map,
    )
    model.config._name_or_path = model.name_or_path = base_name(name)
    if quantize is None:
        _warn_of_slow_products(model)
    return model.eval()


def _warn_of_slow_products(model: PreTrainedModel) -> None:
    if model.device.type == "cpu" and (slow := cpu.complaint(model.dtype)):
        logger.warning("%s; --dtype float32 (in Python dtype='float32') takes twice the memory", slow)


def _pretrained(
    name: str,
    source: Path | str,
    dtype: torch.dtype | None,
    num_labels: int | None,
    seed: int,
    quantize: str | None,
    place: torch.device | str | Mapping[str, Any],
) -> PreTrainedModel:
    only_local = local_only(source)
    config = read_config(name, source, only_local)
    auto: Any = auto_class(config)
    options: dict[str, Any] = {}
    if num_labels is not None:
        auto, options = AutoModelForSequenceClassification, {"num_labels": num_labels}
    if quantize is not None:
        computing = dtype or parse_dtype(config.dtype) or torch.float32
        options["quantization_config"] = quantisation_config(quantize, computing)
    if quantize is not None or not isinstance(place, torch.device):
        options["device_map"] = {"": place} if isinstance(place, torch.device) else place
    try:
        bars = no_progress_bars if _loads_in_seconds(source) else contextlib.nullcontext
        with torch.random.fork_rng(devices=[]), bars():
            torch.manual_seed(seed)
            model, info = auto.from_pretrained(
                str(source),
                dtype=dtype or "auto",
                trust_remote_code=False,
                local_files_only=only_local,
                output_loading_info=True,
                **options,
            )
    except (ImportError, *LOAD_ERRORS) as error:
        raise load_error(name, source, "weights", error, only_local) from error
    _untie(model)
    keep_differentiable(model)
    if "device_map" not in options:
        model.to(place)
    new = _HEADS if num_labels is not None else ()
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith(new)):
        raise VariatorError(
            f"{name} holds no values for {len(missing)} of the model's weights (the first: {missing[0]}): "
            f"the checkpoint is incomplete or belongs to another architecture"
        )
    return model


def _loads_in_seconds(source: Path | str) -> bool:
    folder = Path(source)
    return folder.is_dir() and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < _LARGE


def _with_adapter(name: str, dtype: torch.dtype | None, num_labels: int | None, seed: int) -> PreTrainedModel:
    """The base that a LoRA folder names, with the LoRA merged into its weights."""
    if num_labels is None:
        num_labels = _labels_of(name)
    base = load_model(adapted_base(name), dtype=dtype, num_labels=num_labels, seed=seed)
    try:
        merged: Any = peft().PeftModel.from_pretrained(base, name).merge_and_unload()
    except LOAD_ERRORS as error:
        raise VariatorError(f"cannot read the LoRA in {name}: {reason(error)}") from error
    merged.config._name_or_path = merged.name_or_path = base_name(name)
    model: PreTrainedModel = merged.eval()
    return model


def _labels_of(name: str) -> int | None:
    """The labels of the classifier that a LoRA folder brings along; None where it has none."""
    try:
        with safe_open(local_path(name) / "adapter_model.safetensors", "pt") as file:
            heads = [key for key in file.keys() if key.endswith("classifier.weight")]  # noqa: SIM118
            return file.get_slice(heads[0]).get_shape()[0] if heads else None
    except LOAD_ERRORS:
        return None  # whoever reads the weights says it


def _random_model(
    name: str,
    dtype: torch.dtype | None,
    device: torch.device,
    num_layers: int | None,
    num_labels: int | None,
    seed: int,
) -> PreTrainedModel:
    config = load_config(name, num_layers=num_layers)
    auto = auto_class(config)
    if num_labels is not None:
        auto, config.num_labels = AutoModelForSequenceClassification, num_labels
    if dtype is None:
        dtype = ALIASES[name].dtype if name in ALIASES else parse_dtype(config.dtype) or torch.float32
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            with torch.device("meta"):
                model: PreTrainedModel = auto.from_config(config, dtype=dtype)
            if device.type == "meta":
                _give_own_head(model)
                return model.eval()
            if sum(parameter.numel() for parameter in model.parameters()) >= _LARGE:
                _fill(model, device)
            else:
                with torch.device(device):
                    model = auto.from_config(config, dtype=dtype)
        except LOAD_ERRORS as error:
            raise VariatorError(f"{name}: no model of this shape can be built: {reason(error)}") from error
    return model.eval()


def _give_own_head(model: PreTrainedModel) -> None:
    """Count T5's output matrix where its checkpoint has one (v1.1, FLAN): its configuration says tied in any case."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if getattr(model.config, "scale_decoder_outputs", True) or head is None:
        return
    shared: Any = embeddings.weight
    if head.weight is shared:
        head.weight = torch.nn.Parameter(torch.empty_like(shared))
    model.config.tie_word_embeddings = False


def _fill(model: PreTrainedModel, device: torch.device) -> None:
    """Give a large model on "meta" weights out of one block of random numbers: in seconds, and in the memory of one."""
    model.to_empty(device=device)
    model.tie_weights()
    scale = getattr(model.config, "initializer_range", 0.02)
    block = torch.empty(_BLOCK, device=device).normal_(0, scale).to(model.dtype)
    with torch.no_grad():
        for module in model.modules():
            if any(True for _ in module.buffers(recurse=False)):
                model._init_weights(
                    module
                )  # rotary frequencies and the like, which hang on the configuration
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2:
                    parameter.fill_(0 if name == "bias" else 1)
                    continue
                start = int(torch.randint(_BLOCK, ()))
                for part in parameter.view(-1).split(_BLOCK):
                    first = min(len(part), _BLOCK - start)
                    part[:first] = block[start : start + first]
                    part[first:] = block[: len(part) - first]


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers Auto class for a checkpoint, from what its configuration says it holds."""
    architecture = (config.architectures or [""])[0]
    if architecture.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if architecture.endswith("ForMaskedLM"):
        return AutoModelForMaskedLM
    if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        return AutoModel
    return AutoModelForCausalLM


def _untie(model: PreTrainedModel) -> None:
    """Say in the configuration what the checkpoint did: transformers leaves an own output matrix untied."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(module, "weight", None) for module in (head, embeddings)]
    if None not in weights and weights[0] is not weights[1]:
        model.config.tie_word_embeddings = False


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if dtype not in names:
        raise VariatorError(f"unknown dtype {dtype!r}: use one of {', '.join(names)}")
    return names[dtype]


def _parse_device(device: torch.device | str) -> torch.device:
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise VariatorError(f"device {str(device)!r} cannot be used here ({reason}): try cpu") from error
    return parsed
