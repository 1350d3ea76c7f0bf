"""The Hugging Face hub: whether it answers, and a plugin's files to it and from it. Nothing here waits for ever.

huggingface_hub's client has no time-outs of its own for most calls, and retries an unreachable host for more than 20
seconds per file.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import get_session

from llm_variator.errors import VariatorError

logger = logging.getLogger(__name__)

HUB_PROBE_SECONDS = 3.0
UPLOAD_SECONDS = 120.0
SLOWEST_UPLOAD = 100_000
"""Bytes per second; below it an upload counts as stuck."""


def hub_reachable(seconds: float = HUB_PROBE_SECONDS) -> bool:
    """Whether the Hugging Face hub answers within `seconds`; False at once under HF_HUB_OFFLINE.

    One probe up front lets callers fall back to the local cache.
    """
    if hub_constants.HF_HUB_OFFLINE:
        return False
    try:
        _within(seconds, lambda: str(get_session().head(hub_constants.ENDPOINT, timeout=seconds)))
    except Exception as error:  # any failure of any HTTP backend means the same: not reachable
        logger.debug("hub probe failed: %s", error)
        return False
    return True


def download(
    repo_id: str,
    needed: Sequence[str],
    optional: Sequence[str] = (),
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> Path:
    """Fetch these files of a repository, all of one commit, or find them in the local hub cache; their folder.

    `revision`: a branch, a tag or a commit; None: the main branch. `subfolder`: where in the repository they lie.

    Raises:
        OSError, ValueError: as huggingface_hub does for what it cannot give.
    """
    cached = not hub_reachable()

    def fetch(name: str, revision: str | None) -> Path:
        file = hf_hub_download(repo_id, name, subfolder=subfolder, revision=revision, local_files_only=cached)
        return Path(file)

    folder = fetch(needed[0], revision).parent
    depth = len(Path(subfolder or "").parts)
    commit = [folder, *folder.parents][depth].name
    for name in needed[1:]:
        fetch(name, commit)
    for name in optional:
        try:
            fetch(name, commit)
        except EntryNotFoundError:
            logger.debug("%s has no %s", repo_id, name)
    return folder


def upload(folder: Path, repo_id: str, *, private: bool | None = None) -> str:
    """Make the repository if there is none, and commit the files of `folder` to it; the commit's address.

    Raises:
        VariatorError: the hub does not answer, or refuses.
    """
    mend = f"save the plugin with save_pretrained and upload its folder later (hf upload {repo_id} FOLDER)"
    if not hub_reachable():
        raise VariatorError(f"cannot push to {repo_id!r}: the hub does not answer; {mend}")

    def push() -> str:
        api = HfApi()
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo, folder_path=folder))

    size = sum(file.stat().st_size for file in folder.iterdir())
    try:
        return _within(UPLOAD_SECONDS + size / SLOWEST_UPLOAD, push)
    except (OSError, ValueError) as error:  # all of the hub's errors are one of these
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise VariatorError(
            f"cannot push to {repo_id!r}: {reason}; log in with a token that may write (hf auth login), or {mend}"
        ) from error


def _within(seconds: float, call: Callable[[], str]) -> str:
    """What `call` returns or raises; TimeoutError after `seconds`. In a thread: name resolution knows no time-out."""
    results: list[str] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:  # it is raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]
