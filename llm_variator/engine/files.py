"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from llm_variator.errors import VariatorError


def write_atomically(path: Path, write: str | Callable[[Path], object]) -> None:
    """Write a text, or let `write` fill a temporary neighbour of `path`, then rename it over `path`.

    Raises:
        VariatorError: the place cannot be written, or has no room; what was there before is still there.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        os.close(handle)
        if isinstance(write, str):
            temporary.write_text(write, encoding="utf-8")
        else:
            write(temporary)
        with temporary.open("rb+") as written:  # on the disk before it takes the old file's place
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VariatorError(f"cannot write {path} ({reason}); choose a writable place with room") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
