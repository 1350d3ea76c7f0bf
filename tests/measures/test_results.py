"""Result files hold the figures and their circumstances, no path of the machine, and are whole or absent."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
import transformers

import llm_variator
from llm_variator import VariatorError
from llm_variator.measures.results import scrub_paths, write_atomically, write_result


def write(path: Path, figures: dict, **changes) -> dict:
    arguments = dict(
        command=["llm_variator.evaluate", "--json", str(path)], seed=3, started=time.perf_counter()
    )
    write_result(path, figures, **(arguments | changes))
    return json.loads(path.read_text(encoding="utf-8"))


def test_file_says_how_to_repeat_the_figures(tmp_path):
    result = write(
        tmp_path / "deep" / "x.json", {"nats": 2.5, "rows": [1, 2]}, started=time.perf_counter() - 2
    )
    assert result["figures"] == {"nats": 2.5, "rows": [1, 2]}
    assert result["command"] == "python -m llm_variator.evaluate --json x.json"
    assert result["seed"] == 3
    assert result["versions"]["llm_variator"] == llm_variator.__version__
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["transformers"] == transformers.__version__
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["memory_gib"] > 0
    assert result["machine"]["cpu"]
    assert 2 <= result["wall_seconds"] < 10
    assert result["commit"] is None or len(result["commit"].removesuffix("-dirty")) == 40


def test_no_absolute_path_survives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = Path.home()
    figures = {"data": str(tmp_path / "a" / "b.txt"), "plugin": Path("/opt/models/k2"), "ratio": "1/2 a/b"}
    command = f"llm_variator.train --output={home}/secret/run --data {tmp_path}/x,/srv/y ~/z ../shared/d"
    result = write(tmp_path / "r.json", figures, command=command)
    assert result["figures"] == {"data": "a/b.txt", "plugin": "k2", "ratio": "1/2 a/b"}
    assert result["command"] == "python -m llm_variator.train --output=run --data x,y z ../shared/d"
    assert str(home) not in (tmp_path / "r.json").read_text(encoding="utf-8")


def test_addresses_are_no_paths():
    assert (
        scrub_paths("https://host/a/b and hf://x/y, 3 tokens/s")
        == "https://host/a/b and hf://x/y, 3 tokens/s"
    )


def test_numbers_that_are_not_finite_become_null(tmp_path):
    assert write(tmp_path / "r.json", {"a": math.nan, "b": [math.inf, 1.0]})["figures"] == {
        "a": None,
        "b": [None, 1.0],
    }


def test_file_is_whole_or_absent(tmp_path, monkeypatch):
    file = tmp_path / "r.json"
    write_atomically(file, "old")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(VariatorError, match="No space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_unwritable_place_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VariatorError, match=r"cannot write .*file/r\.json"):
        write(tmp_path / "file" / "r.json", {})
