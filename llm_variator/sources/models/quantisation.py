"""Frozen backbones in 4 bits (NF4) or 8 bits (int8) by bitsandbytes, on CPUs and GPUs.

Matrices of the layers are quantised; embeddings, norms, biases and the output matrix stay as they are, and so do
plugins. A plugin recognises its base by the embeddings: it fits the quantised and the plain model alike.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from llm_variator.config import QUANTISATIONS
from llm_variator.errors import VariatorError
from llm_variator.extras import needed

# Said whenever peft imports bitsandbytes: to install a package that fetches native code and is not needed here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight: its code, an 8-bit scale per 64 weights, an fp32 scale per 256 of those scales."""


def quantisation_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to quantise a checkpoint while it is read.

    Args:
        kind: "nf4" (with double quantisation) or "int8" (LLM.int8).
        dtype: in which NF4's products are computed. int8 rounds its inputs to fp16.

    Raises:
        VariatorError: `kind` is unknown, or bitsandbytes is not installed.
    """
    if kind not in QUANTISATIONS:
        raise VariatorError(f"unknown quantisation {kind!r}: use one of {', '.join(QUANTISATIONS)}")
    _bitsandbytes()
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def quantise(model: PreTrainedModel, kind: str, device: torch.device) -> None:
    """Quantise a loaded model in place, one matrix after the other, on `device`.

    For models that are not read from a checkpoint as they are: random weights, or with a LoRA merged in.
    """
    config, library = quantisation_config(kind, model.dtype), _bitsandbytes()
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or _stays(model, name):
            continue
        made: Any
        width, height, bias = module.in_features, module.out_features, module.bias is not None
        weight = module.weight.detach()
        if kind == "int8":
            made = library.nn.Linear8bitLt(
                width,
                height,
                bias,
                has_fp16_weights=False,
                threshold=config.llm_int8_threshold,
                device="meta",
            )
            # CUDA's quantiser takes fp16 alone
            made.weight = library.nn.Int8Params(weight.half(), requires_grad=False, has_fp16_weights=False)
        else:
            made = library.nn.Linear4bit(
                width, height, bias, model.dtype, compress_statistics=True, quant_type="nf4", device="meta"
            )
            made.weight = library.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
            )
        made.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made.to(device))
        del weight, module
    keep_differentiable(model)
    marks: Any = model  # what transformers notes on a quantised model: trainers and savers ask for it
    model.config.quantization_config = config
    marks.is_quantized, marks.quantization_method = True, config.quant_method
    setattr(marks, f"is_loaded_in_{'8' if kind == 'int8' else '4'}bit", True)


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking NF4 matrices at the first pass without gradients (CPUs with AVX512-BF16).

    Products of repacked ones have no backward pass: after a teacher's pass, gradients would silently be lost.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def base_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights as this process holds them, with scales and codebooks of quantised ones."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += _tensors_of(state)
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        if scales is None:
            scales = getattr(getattr(module, "state", None), "SCB", None)
        tensors += [] if scales is None else [scales]
    storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def predicted_bytes(plain: PreTrainedModel, kind: str | None) -> int:
    """Bytes that the weights of `plain` (on any device, meta too) take when quantised; None: as they are."""
    quantised = scales = 0
    for name, module in plain.named_modules():
        if kind is not None and type(module) is nn.Linear and not _stays(plain, name):
            quantised += module.weight.numel()
            scales += module.out_features
    rest = sum(p.numel() * p.itemsize for p in plain.parameters()) - quantised * plain.dtype.itemsize
    if kind == "int8":
        return rest + quantised + 4 * scales  # an fp32 scale per row
    return rest + int(quantised * NF4_BITS / 8)


def _stays(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers would leave this module as it is: the output matrix, and what has to be fp32."""
    kept = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    return not should_convert_module(name, kept)


def _tensors_of(state: Any) -> list[torch.Tensor]:
    found = [value for value in vars(state).values() if isinstance(value, torch.Tensor)]
    return found + (_tensors_of(state.state2) if getattr(state, "state2", None) is not None else [])


def _bitsandbytes() -> Any:
    bitsandbytes = needed("bitsandbytes", "a quantised model", "quant")
    # Said at every product, about what `quantisation_config` documents.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    return bitsandbytes


def _is_news(record: logging.LogRecord) -> bool:
    return "MatMul8bitLt: inputs will be cast" not in record.getMessage()
