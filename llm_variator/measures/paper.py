"""What the paper printed, read from `paper.yaml`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


@functools.cache
def paper() -> Mapping[str, Any]:
    """All of it."""
    content: Mapping[str, Any] = yaml.safe_load(
        Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    )
    return content


def table_1(model: str) -> Mapping[str, Mapping[str, Any]]:
    """The rows of Table 1 for a model such as "t5-base"; none for one that is not in it."""
    tables = (each for each in paper()["tables"] if each["number"] == 1 and each["model"].lower() == model)
    return next((each["rows"] for each in tables), {})
