"""Plugin folders: shipped in the package, local, or on the hub. Only the names of their files are known here."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from llm_variator.config import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from llm_variator.errors import VariatorError
from llm_variator.sources.models import hub
from llm_variator.sources.models.aliases import ALIASES
from llm_variator.sources.models.names import local_path, reason

_NAME = r"[\w-][\w.-]*"
_PATH = rf"{_NAME}(?:/{_NAME})*"  # of folders, and of branches
_HUB_NAME = re.compile(rf"({_NAME}/{_NAME})(?:/({_PATH}))?(?:@({_PATH}))?")

PLUGINS_DIR = Path(__file__).parents[1] / "plugins"
"""Plugins shipped with the package, as `<base alias>/<plugin name>/`."""


def shipped_plugins() -> list[str]:
    """Names of the plugins inside the package, such as `smollm2-135m/k2`."""
    return sorted(
        config.parent.relative_to(PLUGINS_DIR).as_posix()
        for config in PLUGINS_DIR.glob("*/*/variator_config.json")
    )


class HubPlugin(NamedTuple):
    """Where a plugin lies on the hub."""

    repo: str
    subfolder: str | None = None
    revision: str | None = None
    """A branch, a tag or a commit; None: the main branch."""


def resolve_plugin(
    name: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> Path | HubPlugin:
    """Find a plugin: one shipped in the package, then a local folder, then one on the hub.

    `revision` and `subfolder` are for the hub, where the name may give both: owner/name/sub/folder@revision.

    Raises:
        VariatorError: the name is empty, a file, a missing folder, or no possible hub id; or it is a folder and
            has no revision.
    """
    name = os.fspath(name)
    for what, value in (("revision", revision), ("subfolder", subfolder)):
        if value is not None and not (isinstance(value, str) and re.fullmatch(_PATH, value)):
            raise VariatorError(f"{what} {value!r} is none: give a name as it stands in the repository")
    path = PLUGINS_DIR / name if name in shipped_plugins() else local_path(name)
    if name and path.is_dir():
        if revision is not None:
            raise VariatorError(
                f"{name} is a folder here and has no revision: leave it out, or give a hub id"
            )
        path = path / (subfolder or "")
        if not path.is_dir():
            raise VariatorError(f"{name} has no folder {subfolder!r} in it")
        return path
    if path.is_file():
        raise VariatorError(f"{name} is a file: a plugin is a folder with variator_config.json in it")
    known = ", ".join(shipped_plugins()) or "none"
    found = _HUB_NAME.fullmatch(name)
    if name.split("/")[0] in ALIASES or found is None:
        raise VariatorError(
            f"no plugin {name!r}: neither shipped (those are: {known}) nor a folder; hub ids read owner/name, or "
            "owner/name/subfolder@revision"
        )
    for what, one, other in (("revision", revision, found[3]), ("subfolder", subfolder, found[2])):
        if one and other and one != other:
            raise VariatorError(f"{name!r} names the {what} {other!r} and {one!r} is given: leave one out")
    return HubPlugin(found[1], subfolder or found[2], revision or found[3])


def plugin_folder(
    name: str | os.PathLike[str], *, revision: str | None = None, subfolder: str | None = None
) -> Path:
    """The local folder of a plugin, fetched first if it is on the hub; arguments as for `resolve_plugin`.

    Raises:
        VariatorError: there is no such plugin, or the hub cannot give it.
    """
    found = resolve_plugin(name, revision=revision, subfolder=subfolder)
    if isinstance(found, Path):
        return found
    try:
        return hub.download(
            found.repo,
            [CONFIG_FILE, WEIGHTS_FILE],
            optional=[CARD_FILE],
            revision=found.revision,
            subfolder=found.subfolder,
        )
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        where = [f"{what} {value!r}" for what, value in found._asdict().items() if value]
        raise VariatorError(
            f"no folder {os.fspath(name)!r} here, and from the hub it could not be fetched ({', '.join(where)}: "
            f"{reason(error)}); give a local folder"
        ) from error
