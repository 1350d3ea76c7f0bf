"""`eval/gpu.sh`, rehearsed on the CPU: every part with tiny shapes; parts that fail, that wait, that lack a package."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("gpu", ROOT / "eval" / "gpu.py")
gpu = importlib.util.module_from_spec(_SPEC)
sys.modules["gpu"] = gpu
_SPEC.loader.exec_module(gpu)


def table(*lines: str, monkeypatch, tmp_path, words=()) -> int:
    """The exit status of a table's run, in this process."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path), *words])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return int(ended.value.code)


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_and_once(tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    command = ["bash", "eval/gpu.sh", "--dry", "--results", str(kept)]
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)}
    options = dict(cwd=ROOT, env=environment, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    kinds = {name.removesuffix("-tiny-llama") for name in results}
    assert kinds >= {"tests", "prefill", "prefill-batches", "decode", "decode-batches", "profile", "train"}
    assert kinds >= {"train-kept", "swap", "memory", "compile-ffn,kv:4"}
    assert "1 passed" in results["tests"]["figures"]["summary"]
    for name, result in results.items():
        assert "versions" in result
        assert name == "tests" or result["figures"]["rows"], name
    decoded = results["decode-batches-tiny-llama"]["figures"]["rows"]
    assert {row["case"] for row in decoded} == {"dense", "kv k=4", "kv keeps 250 of 1000"}
    assert all(row["card_ms"] > 0 for row in decoded)
    again = subprocess.run(command, **options)
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(results)


def test_a_part_that_fails_leaves_no_result_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    good = "good 60 bench prefill --model tiny-llama --random-init --device cpu --tokens 16 --repetitions 1"
    assert (
        table(
            "bad 60 bench prefill --plugins nose:2",
            good,
            monkeypatch=monkeypatch,
            tmp_path=tmp_path,
            words=["--dry"],
        )
        == 1
    )
    assert sorted(file.name for file in tmp_path.glob("*.json")) == ["good.json"]
    assert "bad: failed (2)" in capsys.readouterr().out
    assert "nose" in (tmp_path / "bad.log").read_text()


def test_what_does_not_fit_or_is_not_installed_is_said(monkeypatch, tmp_path, capsys):
    lines = ["long 300 bench swap", "packed 1 no_such_package:bench swap", "other 1 bench swap"]
    words = ["--minutes", "1", "long", "packed"]
    assert table(*lines, monkeypatch=monkeypatch, tmp_path=tmp_path, words=words) == 0
    printed = capsys.readouterr().out
    assert "long: left for the next run, it may take 300 s" in printed
    assert "packed: left out, no_such_package is not installed" in printed
    assert "other" not in printed
    assert table(*lines, monkeypatch=monkeypatch, tmp_path=tmp_path, words=["nothing"]) == 2


def test_a_part_of_its_own_process_is_stopped_in_time(monkeypatch, tmp_path):
    part = gpu.Part("slow", 1, None, ["pytest"])
    monkeypatch.setattr(gpu.Part, "command", lambda self, folder: ["this_module_is_not_there"])
    assert gpu.run_apart(part, tmp_path)[0] == 1
    monkeypatch.setattr(gpu.Part, "command", lambda self, folder: ["asyncio"])  # waits for its input
    monkeypatch.setattr(subprocess, "run", _waits)
    assert gpu.run_apart(part, tmp_path) == (124, "so far")


def _waits(command, *, timeout, **options):
    assert timeout == 1
    raise subprocess.TimeoutExpired(command, timeout, output=b"so far")


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in needs]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as made:
        made.writestr(f"{name}.py", f"version = {version!r}")
        made.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines))


def test_wheels_bring_what_is_missing_and_what_that_needs(monkeypatch, tmp_path):
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    wheel(wheels, "brought_by_a_test", "2.0", "needed_by_a_test>=1", "pytest", "never ; extra == 'x'")
    wheel(wheels, "needed_by_a_test", "1.5")
    wheel(wheels, "asked_by_nobody", "1.0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(gpu, "TESTS", ["brought_by_a_test>=2"])
    assert gpu.unsatisfied([Requirement("brought_by_a_test"), Requirement("pytest>=1")])
    assert gpu.bring(wheels, site) == [
        "brought_by_a_test-2.0-py3-none-any.whl",
        "needed_by_a_test-1.5-py3-none-any.whl",
    ]
    assert sorted(file.name for file in site.glob("*.py")) == ["brought_by_a_test.py", "needed_by_a_test.py"]
    assert gpu.bring(wheels, site) == []
    monkeypatch.setattr(gpu, "TESTS", ["brought_by_a_test>=3"])
    with pytest.raises(SystemExit, match=r"run eval/gpu-wheels\.sh"):
        gpu.bring(wheels, site)
