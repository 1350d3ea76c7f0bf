"""No operation between devices, and no question to one, where nothing says so on a CPU: see `fake_device.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_nothing_leaves_the_device_and_nothing_waits_for_it():
    """In a process of its own: a device is registered for good."""
    script = Path(__file__).with_name("fake_device.py")
    paths = os.pathsep.join(str(script.parents[place]) for place in (2, 1))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = {}
    for line in done.stdout.strip().splitlines():
        name, _, numbers = line.rpartition(": ")
        counts[name] = tuple(map(int, numbers.split()))
    assert len(counts) == 7
    assert all(steps == 0 for _, steps in counts.values()), counts  # a step asks for nothing made on the host
    assert all(first <= 4 for first, _ in counts.values()), counts  # indices of heads, made once and kept
