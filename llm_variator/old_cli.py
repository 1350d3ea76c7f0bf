"""What every command line shares: recipes (`--config`), plugin flags and the way errors are shown.

Knows no model. A command line is a function `main(argv)` that builds a `Parser`, reads it with `parse` and is
started by `run`.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers.utils.logging import disable_progress_bar

from llm_variator.config import QUANTISATIONS, VariatorConfig
from llm_variator.errors import VariatorError

PRESETS: dict[str, Callable[..., VariatorConfig]] = {"paper": VariatorConfig.paper}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are VariatorErrors and whose flags cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise VariatorError(f"{message}; see `{self.prog} --help`")


# --- flag types


def positive_int(text: str) -> int:
    """A whole number >= 1."""
    return _bounded(int, text, "a whole number of at least 1", lambda number: number >= 1)


def natural(text: str) -> int:
    """A whole number >= 0."""
    return _bounded(int, text, "a whole number of at least 0", lambda number: number >= 0)


def positive_float(text: str) -> float:
    """A finite number > 0."""
    return _bounded(float, text, "a number above 0", lambda number: 0 < number < float("inf"))


def natural_float(text: str) -> float:
    """A finite number >= 0."""
    return _bounded(float, text, "a number of at least 0", lambda number: 0 <= number < float("inf"))


def _bounded(kind: Callable[[str], Any], text: str, wanted: str, holds: Callable[[Any], bool]) -> Any:
    try:
        number = kind(text)
        fits = holds(number)
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    return number


def names(text: str) -> tuple[str, ...]:
    """`ffn,kv` -> ("ffn", "kv")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def json_mapping(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def ratio(text: str) -> int | dict[str, int]:
    """`2` -> 2; `ffn=2,kv=4` or `{"ffn": 2, "kv": 4}` -> one ratio per site."""
    try:
        if text.lstrip().startswith("{"):
            return json_mapping(text)
        if "=" in text:
            pairs = (part.split("=", 1) for part in names(text))
            return {site.strip(): int(number) for site, number in pairs}
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a whole number or one per site, as in ffn=2,kv=4; got {text!r}"
        ) from None


_MOST_LAYERS = 10_000  # of any model: a range beyond is a slip of the pen


def layer_ranges(text: str) -> tuple[int, ...]:
    """`0-5,8` -> (0, 1, 2, 3, 4, 5, 8)."""
    layers: list[int] = []
    try:
        for part in names(text):
            first, _, last = part.partition("-")
            layers.extend(range(int(first), min(int(last or first), int(first) + _MOST_LAYERS) + 1))
    except ValueError:
        layers = []
    if not layers or len(layers) > _MOST_LAYERS:
        raise argparse.ArgumentTypeError(f"expected layer numbers as in 0-5,8; got {text!r}")
    return tuple(layers)


# What a recipe may give such a flag besides a plain value.
_TAKES_MAPPING: frozenset[Any] = frozenset({json_mapping, ratio})
_TAKES_LIST: frozenset[Any] = frozenset({names, layer_ranges})


# --- plugin flags


def add_variator_flags(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `VariatorConfig` as flags; read them back with `variator_config_from`."""
    group = parser.add_argument_group(
        "plugin", "What is not given keeps VariatorConfig's (or the preset's) default."
    )

    def flag(name: str, text: str, **options: Any) -> None:
        group.add_argument(name, default=argparse.SUPPRESS, help=text, **options)

    flag("--preset", "a named configuration; the flags below override its fields", choices=sorted(PRESETS))
    flag("--k", "compression ratio, one for all sites or one each: 2 or ffn=2,kv=4", type=ratio)
    flag("--sites", "where to compress: some of ffn,attention,kv, and for T5 cross", type=names)
    flag("--r", "bottleneck width of the decompressor", type=int)
    flag("--compressor", "how a group becomes one vector: weighted or mean")
    flag("--decompressor", "how one vector becomes k again: adapter or copy")
    flag("--activation", "in the adapter: identity (paper) or tanh (its released code)")
    flag("--layers", "layers that get a plugin, as in 0-5,8 (default: all)", type=layer_ranges)
    flag(
        "--k-per-layer",
        "per site one ratio for every layer, 1 leaving the layer dense: '{\"ffn\": [1, 2, 2, 4]}'",
        type=json_mapping,
        metavar="JSON",
    )
    flag("--dense-head", "first prompt tokens kept uncompressed", type=int)
    flag("--dense-tail", "least number of last prompt tokens kept uncompressed", type=int)
    flag("--decode-block", "merge generated tokens once so many are older than the dense tail", type=int)


_CONFIG_FLAGS = (
    "k", "sites", "r", "compressor", "decompressor", "activation",
    "layers", "k_per_layer", "dense_head", "dense_tail", "decode_block",
)  # fmt: skip


def variator_flags_given(args: argparse.Namespace) -> list[str]:
    """The plugin flags (with their dashes) that the user or the recipe gave."""
    return [f"--{name.replace('_', '-')}" for name in ("preset", *_CONFIG_FLAGS) if hasattr(args, name)]


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `loading.load_model` takes from --dtype, --random-init, --num-layers, --seed and --quantize."""
    given = {name: getattr(args, name) for name in ("dtype", "random_init", "num_layers", "seed")}
    return {**given, "quantize": getattr(args, "quantize", None)}


def add_quantize_flag(add: Callable[..., Any]) -> None:
    """Add --quantize with an `add_argument`."""
    add(
        "--quantize",
        choices=QUANTISATIONS,
        help="the base's matrices in 4 bits (NF4) or 8 (int8), by bitsandbytes; plugins stay as they are",
    )


def add_text_flags(add: Callable[..., Any], *, data: str, windows: int, batch_size: int) -> None:
    """What a measurement reads; the defaults are the command's own."""
    add("--data", default=data, metavar="SOURCE", help="text, named as in llm_variator.train")
    add(
        "--data-dir", type=Path, help="folder of local data sets NAME/SPLIT.parquet (default: $VARIATOR_DATA)"
    )
    add(
        "--windows", type=positive_int, default=windows, help="stretches of text, evenly spread over the data"
    )
    add("--batch-size", type=positive_int, default=batch_size, help="windows in one forward pass")


def add_base_flags(add: Callable[..., Any], *, dtype: str | None = None, seeds: str) -> None:
    """How a measurement holds its base model, what `--seed` seeds, and where the figures go."""
    add("--device", default="cpu", help="cpu, cuda, ...")
    add(
        "--dtype",
        default=dtype,
        help="of base model and plugins" + ("" if dtype else " (default: as stored)"),
    )
    add("--random-init", action="store_true", help="the model's shape with random weights; no download")
    add("--num-layers", type=positive_int, help="with --random-init: this many layers")
    add("--seed", type=natural, default=0, help=f"of {seeds}")
    add("--json", type=Path, metavar="FILE", help="store the figures with command, versions and machine")


def variator_config_from(args: argparse.Namespace) -> VariatorConfig:
    """The configuration that the flags of `add_variator_flags` describe.

    Raises:
        VariatorError: a field has a wrong value.
    """
    given = {name: getattr(args, name) for name in _CONFIG_FLAGS if hasattr(args, name)}
    return PRESETS[args.preset](**given) if hasattr(args, "preset") else VariatorConfig(**given)


# --- recipes


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `argv` (default: `sys.argv[1:]`), with the values of a recipe `--config FILE` as defaults.

    A recipe is a YAML mapping whose keys are the long flags with underscores. Flags on the command line
    win. With sub-commands, `--config` belongs to each sub-command.

    Raises:
        VariatorError: a wrong flag, or a recipe that is missing, no mapping, or holds an unknown key or
            wrong type; the message names the file and the key.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    leaves = _leaves(parser)
    for leaf in leaves.values():
        leaf.add_argument(
            "--config", metavar="FILE", help="recipe: a YAML file with flags; flags given here override it"
        )
    chosen = leaves.get(tokens[0] if tokens else "", leaves.get(""))
    finder = Parser(add_help=False)
    finder.add_argument("--config")
    recipe = finder.parse_known_args(tokens)[0].config
    if chosen is not None and recipe is not None:
        _apply_recipe(chosen, Path(recipe))
    return parser.parse_args(tokens)


def _leaves(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser under "", or its sub-parsers by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {"": parser}


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file; keys with the value null are left out, they mean the flag's default."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VariatorError(f"recipe {path}: cannot be read ({error.strerror}); check the path") from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
        RecursionError,
    ) as error:  # of texts, dates and numbers
        raise VariatorError(f"recipe {path}: not a YAML file: {error}") from None
    if not isinstance(content, dict):
        raise VariatorError(
            f"recipe {path}: expected a mapping of flags to values, found {type(content).__name__}"
        )
    return {str(key): value for key, value in content.items() if value is not None}


def _apply_recipe(parser: argparse.ArgumentParser, path: Path) -> None:
    flags = {action.dest: action for action in parser._actions if action.option_strings}
    flags = {name: action for name, action in flags.items() if name not in ("help", "config")}
    for key, value in read_recipe(path).items():
        if key not in flags:
            near = difflib.get_close_matches(key, flags, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(flags))}"
            raise VariatorError(f"recipe {path}: unknown key {key!r}; {mend}")
        try:
            parser.set_defaults(**{key: _converted(flags[key], value)})
        except VariatorError as error:
            raise VariatorError(f"recipe {path}: {key}: {error}") from None
        flags[key].required = False


def _converted(action: argparse.Action, value: Any) -> Any:
    """The value of one recipe key as its flag would have stored it, by the flag's own type and choices."""
    probe = Parser(add_help=False)
    probe.error = _refuse  # type: ignore[method-assign]
    probe._add_action(action)
    return getattr(probe.parse_args(_as_tokens(action, value)), action.dest)


def _refuse(message: str) -> NoReturn:
    raise VariatorError(message)


def _as_tokens(action: argparse.Action, value: Any) -> list[str]:
    flag = max(action.option_strings, key=len)
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise VariatorError(f"expected true or false, got {value!r}")
        if value:
            return [action.option_strings[0]]
        return [flag] if isinstance(action, argparse.BooleanOptionalAction) else []
    if isinstance(value, bool):
        raise VariatorError(f"expected a value, got {value!r}")
    if isinstance(value, dict):
        if action.type not in _TAKES_MAPPING:
            raise VariatorError("expected a plain value, got a mapping")
        try:
            return [f"{flag}={json.dumps(value)}"]
        except (TypeError, ValueError) as error:
            raise VariatorError(f"expected plain keys and values, got {value!r} ({error})") from None
    if not isinstance(value, list):
        return [flag, str(value)] if action.nargs else [f"{flag}={value}"]
    if any(isinstance(item, (dict, list, bool)) for item in value):
        raise VariatorError(f"expected plain values in the list, got {value!r}")
    if action.type in _TAKES_LIST:
        return [f"{flag}={','.join(map(str, value))}"]
    if not action.nargs:
        raise VariatorError("expected one value, got a list")
    return [flag, *map(str, value)]


# --- start


def run(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a command line and end the process: 0, 2 after a VariatorError (one line), 130 when interrupted."""
    if not sys.stderr.isatty():  # a file would keep every update of a bar
        disable_progress_bar()
    try:
        main(None)
    except VariatorError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
