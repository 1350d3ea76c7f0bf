"""Plugin folders: shipped in the package, local, or on the hub. Only the names of their files are known here."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llm_variator.config import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from llm_variator.errors import VariatorError
from llm_variator.sources.models import hub
from llm_variator.sources.models.aliases import ALIASES
from llm_variator.sources.models.names import reason

PLUGINS_DIR = Path(__file__).parents[1] / "plugins"
"""Plugins shipped with the package, as `<base alias>/<plugin name>/`."""


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
        return hub.download(found, [CONFIG_FILE, WEIGHTS_FILE], optional=[CARD_FILE])
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        raise VariatorError(
            f"plugin {found!r} could not be fetched ({reason(error)}); give a local folder"
        ) from error
