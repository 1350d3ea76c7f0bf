"""`eval/kvpress_presses.py` in its own environment: a press that keeps everything is the dense model."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path

import pytest
from test_frontier import WINDOWS, frontier_of
from tiny import model_folder
from tiny_tasks import write_tasks

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-kvpress" / "bin" / "python"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PYTHON.parents[1] / ".done").is_file(), reason="no .venv-kvpress: make kvpress"),
]


def run(script: str, *line) -> None:
    words = [PYTHON, ROOT / "eval" / script, "--model", model_folder(), *line]
    subprocess.run(list(map(str, words)), check=True, timeout=300)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the presses leave of a tiny model, in the frontier's tables and in their file."""
    folder = tmp_path_factory.mktemp("kvpress")
    data, tasks, there = write_tasks(folder / "data", "squad"), folder / "tasks.json", folder / "presses.json"
    flags = ["--also", "--questions", 2, "--shots", 1, "--data-dir", data]
    frontier_of(folder, "--export", tasks, *flags)
    zap = folder / "zap"
    text = data / "squad" / "train.parquet"
    run("kvpress_kvzap.py", "--text", text, "--output", zap, "--pieces", 2, "--tokens", 40)
    presses = ["Knorm", "AdaKV:Knorm", "KVzip", "KVzap"]
    line = ["--presses", *presses, "--entries", 1, 0.5, "--kvzap", zap, "--window", 4]
    run("kvpress_presses.py", "--tasks", tasks, "--output", there, *line)
    figures = frontier_of(folder, "--elsewhere", there, *flags)["figures"]
    result = json.loads(there.read_text())
    # stopped after the text: what is there stays, the rest is measured
    begun = copy.deepcopy(result)
    for condition in begun["conditions"]:
        condition["texts"][0]["nats"][0] = 7.0
        condition["answers"] = {}
    there.write_text(json.dumps(begun))
    run("kvpress_presses.py", "--tasks", tasks, "--output", there, *line)
    return figures, result, json.loads(there.read_text())


def rows(table) -> dict[str, dict]:
    return {row["condition"]: row for row in table["rows"]}


LABELS = ("Knorm {}%", "AdaKV of Knorm {}%, masked", "KVzip {}%, masked", "KVzap {}%, masked")


@pytest.mark.parametrize("label", LABELS)
def test_presses_join_the_table(found, label):
    figures, _, _ = found
    texts = rows(figures["texts"][0])
    whole, half = texts[label.format(100)], texts[label.format(50)]
    assert whole["cross_entropy"] == pytest.approx(texts["dense"]["cross_entropy"], abs=1e-5)
    assert whole["greedy_agreement"] == whole["kv_entries"] == whole["kv_bytes"] == 1
    assert half["kv_entries"] == half["kv_bytes"] == pytest.approx(0.5)
    assert half["cross_entropy"] != pytest.approx(texts["dense"]["cross_entropy"], abs=1e-5)
    for key in ("questions", "hidden_questions"):
        answers = rows(figures[key])
        whole, half = answers[label.format(100)], answers[label.format(50)]
        assert whole["same_answer"] == 100
        assert whole["gold_nats"] == pytest.approx(answers["dense"]["gold_nats"], abs=1e-5)
        assert whole["kv_entries"] == whole["kv_bytes"] == 1
        assert half["kv_entries"] == half["kv_bytes"] == pytest.approx(0.5, abs=0.01)
        assert half["gold_nats"] != pytest.approx(answers["dense"]["gold_nats"], abs=1e-5)


def test_what_is_kept_of_every_window(found):
    _, there, resumed = found
    assert [one["label"] for one in there["conditions"]] == [
        label.format(share) for label in LABELS for share in (100, 50)
    ]
    for one in there["conditions"]:
        assert len(one["texts"][0]["nats"]) == WINDOWS
        assert set(one["answers"]) == {"seen", "hidden"}
    assert all(one["texts"][0]["nats"][0] == 7 for one in resumed["conditions"])
    for one, again in zip(there["conditions"], resumed["conditions"], strict=True):
        assert again["answers"] == one["answers"]
