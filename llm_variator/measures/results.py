"""Result files: figures together with everything needed to read and repeat them.

A result never holds a path of the machine it was made on: absolute paths become relative to the working
directory, or keep their last name only.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import llm_variator
from llm_variator.engine.files import write_atomically

_ABSOLUTE_PATH = re.compile(r"(?<![\w./~:-])(?:[A-Za-z]:\\|/|~/)[^\s,='\"]+")


def result_of(
    figures: Mapping[str, Any], *, command: str | Sequence[str], seed: int | None, started: float
) -> dict[str, Any]:
    """`figures` with their circumstances, as `write_result` writes them."""
    result = {
        "figures": figures,
        "command": f"python -m {command if isinstance(command, str) else shlex.join(command)}",
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(time.perf_counter() - started, 3),
    }
    plain: dict[str, Any] = _clean(result)
    return plain


def write_result(
    path: str | Path,
    figures: Mapping[str, Any],
    *,
    command: str | Sequence[str],
    seed: int | None,
    started: float,
) -> None:
    """Write `figures` and their circumstances to a JSON file, whole or not at all.

    Args:
        path: the file; missing folders are made.
        figures: what was measured; numbers that are not finite are stored as null.
        command: what follows `python -m`, as words: `["llm_variator.evaluate", *argv]`, or one string.
        seed: of the run, None where nothing is random.
        started: `time.perf_counter()` at the start of the run.

    Raises:
        VariatorError: the file cannot be written.
    """
    store(path, result_of(figures, command=command, seed=seed, started=started))


def store(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write what `result_of` gave, whole or not at all; missing folders are made.

    Raises:
        VariatorError: the file cannot be written.
    """
    write_atomically(Path(path), json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    return {
        "llm_variator": llm_variator.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """The machine: processor, cores this process may use, memory in GiB, accelerators by name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] or None,
    }


def peak_memory_gib() -> dict[str, float | None]:
    """The most memory this process held so far, in GiB: on the machine, and on its GPU."""
    peak: float | None = None
    if sys.platform != "win32":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**30 if sys.platform == "darwin" else 2**20
        )
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"process": peak, "gpu": gpu}


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this source tree, with `-dirty` where tracked files differ; None outside a repository."""
    here = Path(__file__)

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=here.parent, capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # An installed copy can lie inside somebody else's repository: ask whether this file is tracked.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and git("status", "--porcelain", "--untracked-files=no") else head


def _clean(value: Any) -> Any:
    """`value` as plain JSON, paths scrubbed, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {scrub_paths(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, Path)):
        return scrub_paths(str(value))
    return value


def scrub_paths(text: str) -> str:
    """`text` with absolute paths shortened as the top of this file says."""
    return _ABSOLUTE_PATH.sub(lambda match: _short(match.group()), text)


def _short(path: str) -> str:
    absolute = Path(path).expanduser()
    if absolute.is_relative_to(Path.cwd()):
        return absolute.relative_to(Path.cwd()).as_posix()
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
