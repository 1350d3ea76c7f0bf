"""What was measured before, kept in files: a run that is repeated or extended measures only what is new."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llm_variator.engine.contexts.fingerprints import model_fingerprint
from llm_variator.engine.files import write_atomically
from llm_variator.measures.conditions import Condition, WithPlugin
from llm_variator.measures.results import versions
from llm_variator.model import VariatorModel

T = TypeVar("T")

PACKAGE = Path(__file__).parent.parent
_MEASURING = (
    "config.py",
    "model.py",
    "engine/**/*.py",
    "sources/**/*.py",
    "measures/**/*.py",
    "train/least_squares.py",
    "evaluate/*.py",
)
"""Where the code is that decides what is measured: rather a folder too many than a figure of other code."""


class Store:
    """A folder of measurements, each under a digest of all that it depends on.

    Attributes:
        found: how many measurements came from the folder.
    """

    def __init__(self, read: Path | None, write: Path, settings: Mapping[str, Any]) -> None:
        """`settings` hold for all measurements; `read` None: nothing is taken from before."""
        self.found = 0
        self._read, self._write, self._settings = read, write, settings

    @classmethod
    def of(cls, model: VariatorModel, read: Path | None, write: Path) -> Store:
        """For measurements of `model`'s base as it is now: its weights and their form, and the code that runs it."""
        config = model.base.config
        settings = {
            "model": dataclasses.asdict(model.signature),
            "weights": model_fingerprint(model.base),
            "dtype": str(model.base.dtype),
            "quantised": str(getattr(config, "quantization_config", None)),
            "attention": config._attn_implementation,
            "device": str(model.base.device),
        }
        return cls(read, write, settings | {"versions": versions(), "source": source_digest()})

    def get(
        self, condition: Condition, about: Mapping[str, Any], measure: Callable[[], T], kind: type[T]
    ) -> T:
        """The measurement of `condition`, a dataclass of type `kind`; `about` is what else it depends on."""
        key = [kind.__name__, identity(condition), self._settings, about]
        name = f"{digest(key)}.json"
        if self._read is not None and (self._read / name).is_file():
            self.found += 1
            return kind(**json.loads((self._read / name).read_text(encoding="utf-8")))
        result: Any = measure()
        write_atomically(self._write / name, json.dumps(dataclasses.asdict(result)))
        return result


def identity(condition: Condition) -> str:
    """What a condition does, whatever it is called."""
    if isinstance(condition, WithPlugin):
        condition = dataclasses.replace(condition, label="", name="")
    return repr(condition)


def digest(value: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def source_digest() -> str:
    """Of the code that decides what is measured."""
    total = hashlib.sha256()
    for file in sorted(file for pattern in _MEASURING for file in PACKAGE.glob(pattern)):
        total.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    return total.hexdigest()
