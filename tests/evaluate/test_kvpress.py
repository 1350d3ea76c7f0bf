"""`eval/kvpress_presses.py` in its own environment: a press that keeps everything is the dense model."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from test_frontier import CONTEXT, WINDOWS, frontier_of
from tiny import model_folder
from tiny_tasks import write_tasks

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-kvpress" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(not (PYTHON.parents[1] / ".done").is_file(), reason="no .venv-kvpress: make kvpress")
def test_presses_join_the_table(tmp_path):
    data, tasks, there = (
        write_tasks(tmp_path / "data", "squad"),
        tmp_path / "tasks.json",
        tmp_path / "presses.json",
    )
    flags = ["--also", "--questions", 2, "--shots", 0, "--data-dir", data]
    frontier_of(tmp_path, "--export", tasks, *flags)
    line = [PYTHON, ROOT / "eval" / "kvpress_presses.py", "--tasks", tasks, "--model", model_folder()]
    line += ["--presses", "Knorm", "--entries", 1, 0.5, "--output", there]
    subprocess.run(list(map(str, line)), check=True, timeout=300)
    figures = frontier_of(tmp_path, "--elsewhere", there, *flags)["figures"]
    dense, _, whole, half = figures["texts"][0]["rows"]
    assert whole["condition"] == "Knorm 100%"
    assert whole["cross_entropy"] == pytest.approx(dense["cross_entropy"], abs=1e-5)
    assert whole["greedy_agreement"] == whole["kv_entries"] == 1
    assert half["kv_entries"] == 0.5
    assert half["cross_entropy"] != pytest.approx(dense["cross_entropy"], abs=1e-5)
    same, fewer = figures["questions"]["rows"][-2:]
    assert same["same_answer"] == 100
    assert fewer["kv_entries"] == pytest.approx(0.5, abs=0.01)
    assert len(json.loads(there.read_text())["conditions"][0]["texts"][0]["nats"]) == WINDOWS
    assert CONTEXT % 2 == 0
