"""Values with a form of their own, as types of a settings dataclass.

The functions in `Annotated` take what the command line says (a text) or what a recipe holds (any YAML value).
"""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from llm_variator.errors import VariatorError
from llm_variator.extras import needed


def _number(kind: type, wanted: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        try:
            if (
                isinstance(value, (str, int, kind))
                and not isinstance(value, bool)
                and holds(number := kind(value))
            ):
                return number
        except (ValueError, OverflowError):
            pass
        raise ArgumentTypeError(f"expected {wanted}, got {value!r}")

    return read


Whole = Annotated[int, _number(int, "a whole number", lambda number: True)]
PositiveInt = Annotated[int, _number(int, "a whole number of at least 1", lambda number: number >= 1)]
Natural = Annotated[int, _number(int, "a whole number of at least 0", lambda number: number >= 0)]
Seed = Annotated[int, _number(int, "a whole number from 0 to 2^32 - 1", lambda number: 0 <= number < 2**32)]
Port = Annotated[int, _number(int, "a port from 1 to 65535", lambda number: 1 <= number < 2**16)]
PositiveFloat = Annotated[float, _number(float, "a number above 0", lambda number: 0 < number < float("inf"))]
NaturalFloat = Annotated[
    float, _number(float, "a number of at least 0", lambda number: 0 <= number < float("inf"))
]
Share = Annotated[float, _number(float, "a share above 0, at most 1", lambda number: 0 < number <= 1)]


def device(value: Any) -> str:
    """What torch calls a device; which there are is seen where a model is loaded."""
    if isinstance(value, str) and value != "meta":
        return value
    raise ArgumentTypeError(f"expected a device that computes, as in cpu or cuda:0; got {value!r}")


Device = Annotated[str, device]


def can_hold_files(folder: Path) -> bool:
    """Whether files can be written into a folder that is there or can be made, as far as can be told before."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK)


def output_file(value: Any) -> Path:
    """A file that can be written, as far as can be told before the work."""
    if isinstance(value, (str, Path)) and str(value):
        path = Path(value)
        if not path.is_dir() and can_hold_files(path.absolute().parent):
            return path
    raise ArgumentTypeError(f"expected a file that can be written, got {str(value)!r}")


OutputFile = Annotated[Path, output_file]
PLOTS = (".png", ".svg", ".pdf")


def plot_file(value: Any) -> Path:
    """A figure that can be written and drawn, as far as can be told before the work."""
    path = output_file(value)
    if path.suffix.lower() not in PLOTS:
        raise ArgumentTypeError(
            f"expected a file name that ends with one of {', '.join(PLOTS)}, got {str(value)!r}"
        )
    try:
        needed("matplotlib.figure", "drawing", "report")
    except VariatorError as error:
        raise ArgumentTypeError(str(error)) from None
    return path


OutputPlot = Annotated[Path, plot_file]


def names(value: Any) -> tuple[str, ...]:
    """`ffn,kv` or a list -> ("ffn", "kv")."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ArgumentTypeError(f"expected names as in a,b; got {value!r}")
    return tuple(part.strip() for part in parts if part.strip())


def json_mapping(value: Any) -> dict[str, Any]:
    """A JSON object, or a mapping of plain keys and values."""
    try:
        value = json.loads(value if isinstance(value, str) else json.dumps(value))
    except TypeError as error:
        raise ArgumentTypeError(f"expected plain keys and values, got {value!r} ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"expected a JSON object, got {value!r} ({error})") from None
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"expected a JSON object, got {value!r}")
    return value


def ratio(value: Any) -> int | dict[str, int]:
    """`2` -> 2; `ffn=2,kv=4`, `{"ffn": 2, "kv": 4}` or such a mapping -> one ratio per site."""
    try:
        if isinstance(value, Mapping) or str(value).lstrip().startswith("{"):
            return json_mapping(value)
        if isinstance(value, str) and "=" in value:
            pairs = (part.split("=", 1) for part in names(value))
            return {site.strip(): int(number) for site, number in pairs}
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise ArgumentTypeError(f"expected a whole number or one per site, as in ffn=2,kv=4; got {value!r}")


def word(value: Any) -> str | dict[str, str]:
    """`mean` -> "mean"; `ffn=weighted,kv=select`, such a JSON object or mapping -> one word per site."""
    if isinstance(value, Mapping) or (isinstance(value, str) and value.lstrip().startswith("{")):
        found = json_mapping(value)
    elif isinstance(value, str) and "=" in value:
        pairs = (part.split("=", 1) for part in names(value) if "=" in part)
        found = {site.strip(): one.strip() for site, one in pairs}
    else:
        found = value
    words = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(one, str) and one for one in words):
        raise ArgumentTypeError(
            f"expected a word or one per site, as in ffn=weighted,kv=select; got {value!r}"
        )
    return found


def json_lists(value: Any) -> tuple[tuple[int, ...], ...]:
    """A JSON list of lists of whole numbers, or such lists."""
    try:
        rows = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        rows = None
    whole = isinstance(rows, (list, tuple)) and all(
        isinstance(row, (list, tuple)) and all(type(number) is int for number in row) for row in rows
    )
    if not whole:
        raise ArgumentTypeError(f"expected a JSON list of lists of whole numbers, got {value!r}")
    return tuple(tuple(row) for row in rows)


_MOST_LAYERS = 10_000  # of any model: a range beyond is a slip of the pen


def layer_ranges(value: Any) -> tuple[int, ...]:
    """`0-5,8` or a list -> (0, 1, 2, 3, 4, 5, 8)."""
    layers: list[int] = []
    try:
        parts = map(str, value) if isinstance(value, (list, tuple)) else names(str(value))
        for part in parts:
            first, _, last = part.partition("-")
            layers.extend(range(int(first), min(int(last or first), int(first) + _MOST_LAYERS) + 1))
    except ValueError:
        layers = []
    if not layers or len(layers) > _MOST_LAYERS:
        raise ArgumentTypeError(f"expected layer numbers as in 0-5,8; got {value!r}")
    return tuple(layers)


Names = Annotated[tuple[str, ...], names]
JsonMapping = Annotated[dict[str, Any], json_mapping]
Ratio = Annotated[int | dict[str, int], ratio]
Layers = Annotated[tuple[int, ...], layer_ranges]
Word = Annotated[str | dict[str, str], word]
JsonLists = Annotated[tuple[tuple[int, ...], ...], json_lists]
