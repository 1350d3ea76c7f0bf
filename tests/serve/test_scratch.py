"""A killed server's folder is removed by the next server, a living one's never."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

from llm_variator.serve.scratch import PREFIX, scratch_folder

HOLD = """
import time
from llm_variator.serve.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    time.sleep(100)
"""


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as other:
        theirs = other.stdout.readline().strip()
        with scratch_folder() as ours:
            assert {str(path) for path in tmp_path.glob(f"{PREFIX}*")} == {ours, theirs}
        assert [str(path) for path in tmp_path.iterdir()] == [theirs]
        other.send_signal(signal.SIGKILL)
        other.wait(60)
    assert [str(path) for path in tmp_path.iterdir()] == [theirs]
    with scratch_folder() as ours:
        assert [str(path) for path in tmp_path.iterdir()] == [ours]
    assert not list(tmp_path.iterdir())
