"""From a settings dataclass to jsonargparse: how a flag is declared, and the parser that reads it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
from collections.abc import Mapping
from types import EllipsisType, NoneType
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

import jsonargparse

from llm_variator.errors import VariatorError

REQUIRED: Any = dataclasses.MISSING


def flag(default: Any, text: str, **how: Any) -> Any:
    """A field of a settings dataclass, with its help.

    Args:
        default: The field's; `REQUIRED`: flag or recipe must give it.
        text: The help.
        how: `metavar` and `choices` as in argparse; `repeats=True`: giving the flag again adds to it;
            `positional=True`: the value stands without a flag; `hidden=True`: not in the help;
            `may_be_empty=True`: several values, or none after the flag.
    """
    return dataclasses.field(default=default, metadata={"text": text, **how})


class Parser(jsonargparse.ArgumentParser):
    """Raises a VariatorError of one line where the library would print its usage and leave."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise in plain words, with the flag that an unknown one may stand for."""
        if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
            known = [word for action in self._actions for word in action.option_strings]
            near = difflib.get_close_matches(unknown[1], known, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        message = re.sub(r"\n\s+Source: .*", "", message, flags=re.DOTALL)  # of version 5
        message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).replace("typing.Literal", "Literal")
        message = re.sub(r"Expected (?:a|type:) (.*)\. Got value: ", r"expected \1, got ", message)
        message = message.replace("expected Literal", "expected one of ").replace("Not of type Path: ", "")
        message = re.sub(r'^Parser key "(\w+)"', lambda key: f"argument {spelled(key[1])}", message)
        raise VariatorError(" ".join(message.split())) from ex


def parser_of(settings: type[Any], *, prog: str) -> Parser:
    """The flags of a settings dataclass, whose docstring says what the command does.

    The fields of a mix-in stand together, under its docstring. A field declared anew with a plain default keeps the
    mix-in's help.
    """
    plain = argparse.HelpFormatter
    made = Parser(prog=prog, description=inspect.getdoc(settings), allow_abbrev=False, formatter_class=plain)
    made.add_argument(
        "--config", metavar="FILE", help="recipe: a YAML file with flags; flags here override it"
    )
    hints = get_type_hints(settings, include_extras=True)
    groups: dict[type[Any], Any] = {settings: made}
    for field in dataclasses.fields(settings):
        owner, how = _declared(settings, field.name)
        if owner not in groups:
            groups[owner] = made.add_argument_group((inspect.getdoc(owner) or "").rstrip("."))
        name = field.name if how.get("positional") else spelled(field.name)
        groups[owner].add_argument(name, **_options(field.default, hints[field.name], how))
    return made


def spelled(name: str) -> str:
    """A field as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def _declared(settings: type[Any], name: str) -> tuple[type[Any], Mapping[str, Any]]:
    """The class that declares a field by `flag`, and how."""
    for base in settings.__mro__:
        field = vars(base).get("__dataclass_fields__", {}).get(name)
        if field is not None and field.metadata and name in inspect.get_annotations(base):
            return base, field.metadata
    raise TypeError(f"{settings.__name__}.{name} is no flag: declare it by `flag`")


def _options(default: Any, hint: Any, how: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `add_argument`. A type is converted by the library, or by the function in its `Annotated`."""
    options = {name: how[name] for name in ("metavar", "choices") if name in how}
    # Defaults are the dataclass's alone: what is parsed is what was given.
    options |= {
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS if "hidden" in how else _help(default, hint, how).replace("%", "%%"),
    }
    if NoneType in get_args(hint):  # X | None
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if hint is bool:
        return options | {"action": argparse.BooleanOptionalAction if default is True else "store_true"}
    if get_origin(hint) is tuple:
        hint, *others = get_args(hint)
        several = "*" if how.get("may_be_empty") else "+"
        options["nargs"] = several if isinstance(others[0], EllipsisType) else 1 + len(others)
        if how.get("repeats"):
            options["action"] = "extend"
    elif how.get("positional"):
        options["nargs"] = "?"  # a recipe may give it
    return options | {"type": get_args(hint)[1] if get_origin(hint) is Annotated else hint}


def _help(default: Any, hint: Any, how: Mapping[str, Any]) -> str:
    text = str(how["text"])
    if default is REQUIRED:
        return f"{text} (required)"
    if default is None or default is False or default == () or "(default" in text:
        return text
    between = " " if get_origin(hint) is tuple else ","  # as it is typed: several words, or one
    shown = between.join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"{text} (default: {shown})"
