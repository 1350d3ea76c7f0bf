"""The folder in which a server's processes meet: their sockets, and the counters they share.

A server that is killed cannot remove its own, so the next one to start does. A lock that lives as long as the
server's processes tells which are still in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "variator-serve-"
LOCK = "lock"


@contextlib.contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for one server's life."""
    _sweep(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        starting = Path(folder, "starting")
        with starting.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            starting.rename(Path(folder, LOCK))  # nobody finds it unlocked
            yield folder


def _sweep(parent: Path) -> None:
    """Remove the folders of servers that are no more."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open() as lock:  # another user's, or in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
