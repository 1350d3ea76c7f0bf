"""The door of every command: settings read from flags and a recipe, and the way errors are shown.

A command is a frozen dataclass whose fields are declared by `flag`, and a function `main(argv)` that calls `read`
and is started by `run`. What several commands have in common stands in `flags`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from transformers.utils.logging import disable_progress_bar

from llm_variator.cli.parser import REQUIRED, Parser, flag, parser_of, spelled
from llm_variator.errors import VariatorError

__all__ = ["REQUIRED", "flag", "parser_of", "read", "read_command", "read_recipe", "run", "spelled"]

S = TypeVar("S")


def read(settings: type[S], argv: Sequence[str] | None = None, *, prog: str) -> S:
    """An instance from `argv` (default: `sys.argv[1:]`) and, where it is silent, from a recipe `--config FILE`.

    A recipe is a YAML mapping whose keys are the long flags with underscores.

    Raises:
        VariatorError: a wrong flag, or a recipe that is missing, no mapping, or holds an unknown key or a wrong
            value; the message names the flag, or the file and the key.
    """
    parser = parser_of(settings, prog=prog)
    try:
        given = _given(parser.parse_args(sys.argv[1:] if argv is None else argv, defaults=False))
    except VariatorError as error:
        raise VariatorError(f"{error}; see `{prog} --help`") from None
    recipe = given.pop("config", None)
    given = (_from_recipe(parser, Path(recipe)) if recipe else {}) | given
    required = [field for field in dataclasses.fields(settings) if field.default is REQUIRED]  # type: ignore[arg-type]
    if missing := [field for field in required if field.name not in given]:
        wanted = ", ".join(
            field.name if "positional" in field.metadata else spelled(field.name) for field in missing
        )
        raise VariatorError(f"the following arguments are required: {wanted}; see `{prog} --help`")
    return settings(**given)


def read_command(
    commands: Mapping[str, type[Any]], argv: Sequence[str] | None = None, *, prog: str, text: str
) -> Any:
    """Settings of the command named by the first word of `argv`; their class tells which it is."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in commands:
        return read(commands[words[0]], words[1:], prog=f"{prog} {words[0]}")
    about = [f"  {name:15} {(inspect.getdoc(kind) or '').splitlines()[0]}" for name, kind in commands.items()]
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog=prog, description="\n".join([text, "", *about]), allow_abbrev=False, formatter_class=form
    )
    parser.add_argument("command", choices=tuple(commands), help=f"its flags: `{prog} COMMAND --help`")
    try:
        parser.parse_args(words)
    except VariatorError as error:
        raise VariatorError(f"{error}; see `{prog} --help`") from None
    raise AssertionError("unreachable: known commands are read above")


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file; keys with the value null are left out, they mean the flag's default."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VariatorError(f"recipe {path}: cannot be read ({error.strerror}); check the path") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # of texts, dates and numbers
        raise VariatorError(f"recipe {path}: not a YAML file: {error}") from None
    if not isinstance(content, dict):
        raise VariatorError(
            f"recipe {path}: expected a mapping of flags to values, found {type(content).__name__}"
        )
    return {str(key): value for key, value in content.items() if value is not None}


def _from_recipe(parser: Parser, path: Path) -> dict[str, Any]:
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    values: dict[str, Any] = {}
    for key, value in read_recipe(path).items():
        if key not in actions:
            near = difflib.get_close_matches(key, actions, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(actions))}"
            raise VariatorError(f"recipe {path}: unknown key {key!r}; {mend}")
        try:
            shaped = {key: _shaped(actions[key], value)}
            values |= _given(parser.parse_object(shaped, defaults=False))
        except (VariatorError, argparse.ArgumentTypeError) as error:
            problem = re.sub(r"^argument (?:--)?[\w-]+(?: element \d+)?: ", "", str(error))
            raise VariatorError(f"recipe {path}: {key}: {problem}") from None
    return values


def _shaped(action: argparse.Action, value: Any) -> Any:
    """A recipe's value as the flag would have it: true or false, a list of the right length; raises for others."""
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise VariatorError(f"expected true or false, got {value!r}")
    elif action.nargs not in (None, "?"):
        value = value if isinstance(value, list) else [value]
        empty = not value and action.nargs != "*"
        if empty or any(isinstance(item, (dict, list, bool)) for item in value):
            raise VariatorError(f"expected plain values in the list, got {value!r}")
        if isinstance(action.nargs, int) and len(value) != action.nargs:
            raise VariatorError(f"expected a list of {action.nargs}, got {value!r}")
    return value


def _given(parsed: Any) -> dict[str, Any]:
    """What was given, as a frozen dataclass holds it: no None, tuples for lists."""
    given = {name: value for name, value in parsed.as_dict().items() if value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def run(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a command line and end the process: 0, 2 after a VariatorError (one line), 130 when interrupted."""
    if not sys.stderr.isatty():  # a file would keep every update of a bar
        disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        main(None)
    except VariatorError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
