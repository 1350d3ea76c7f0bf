"""Processes that save, train and resume are killed at random moments: nothing is lost, nothing is corrupt."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from pathlib import Path

import psutil
import pytest
import torch
import victims
from safetensors.torch import load_file
from tiny import model_folder

from llm_variator.engine.contexts import CompressedContext

PATIENCE = 1800  # seconds for a process to begin or end: machines may be busy
SAVING = 0.1  # seconds of processor time until a saving process is killed, at most


@pytest.fixture(scope="module")
def processes():
    """Processes fork off one that has imported everything, and no more."""
    here, before = Path(__file__).parent, os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), str(here.parents[1]), before])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["victims"])
    yield context
    os.environ["PYTHONPATH"] = before


class Killer:
    """Starts a victim and kills it at a random moment after it began its work.

    Moments are of processor time, so that a busy machine changes nothing.
    """

    def __init__(self, processes, victim, *args) -> None:
        self.processes, self.victim, self.args = processes, victim, args
        self.random = random.Random(0)
        self.done = processes.Value("q", 0)
        self.kills = 0
        self.used = 0.0
        """Processor time that the last process took."""

    def strike(self, longest: float) -> bool:
        """One process; False if it ended before it was killed."""
        started = self.processes.Event()
        process = self.processes.Process(
            target=self.victim, args=(*self.args, started, self.done), daemon=True
        )
        process.start()
        deadline = time.monotonic() + PATIENCE
        while not started.wait(0.05):
            assert process.exitcode is None, "the victim died by itself"
            assert time.monotonic() < deadline, "the victim does not begin"
        begun, limit = _used(process.pid), self.random.uniform(0, longest)
        self.used = begun
        while process.exitcode is None and self.used - begun < limit:
            self.used = max(_used(process.pid), self.used)  # of a process that is gone, 0
            time.sleep(0.002)
            assert time.monotonic() < deadline, "the victim does not end"
        time.sleep(self.random.uniform(0, 0.01))  # the system counts processor time in steps of as much
        self.used -= begun
        ended = process.exitcode is not None
        process.kill()
        process.join()
        assert process.exitcode in (0, -9), "the victim died by itself"
        self.kills += process.exitcode != 0
        return not ended and process.exitcode != 0


def _used(pid: int | None) -> float:
    try:
        return sum(psutil.Process(pid).cpu_times()[:2])
    except psutil.NoSuchProcess:
        return 0.0


def test_saving_a_plugin(request, figures, processes, tmp_path):
    kills = (request.config.getoption("kills") or 8) // 4
    folder = tmp_path / "plugin"
    killer = Killer(processes, victims.saves, folder)
    own = victims.model("merges")
    while killer.kills < kills:
        assert killer.strike(longest=SAVING)
        saved = load_file(folder / "variator.safetensors")
        numbers = {float(number) for value in saved.values() for number in value.unique()}
        done = killer.done.value
        assert numbers in ({done}, {done + 1}), "the last save that ended, or the one that was under way"
        own.load_plugin(folder, "again")
        own.delete_plugin("again")
    figures["plugin"] = {"kills": killer.kills, "saves": killer.done.value}


@pytest.mark.parametrize("form", victims.CONFIGS)
def test_saving_a_context(request, figures, processes, tmp_path, form):
    kills = (request.config.getoption("kills") or 8) // 8
    file = tmp_path / "context.safetensors"
    killer = Killer(processes, victims.saves_contexts, file, form)
    own = victims.model(form)
    while killer.kills < kills:
        assert killer.strike(longest=SAVING)
        context = CompressedContext.load(file, own)
        assert context.input_ids.shape[1] in (100 + (killer.done.value + more) % 300 for more in (0, 1))
        own.generate([[5, 6]], context=context, max_new_tokens=1)
    figures[f"context of a plugin that {form}"] = {"kills": killer.kills, "saves": killer.done.value}


@pytest.mark.parametrize("victim", [victims.trains, victims.fits])
def test_a_run_and_its_resumption(request, figures, processes, tmp_path, victim):
    """However often it is killed, a run ends with the very weights of one that was left alone."""
    kills = (request.config.getoption("kills") or 8) // 4
    whole = tmp_path / "whole"
    whole.mkdir()
    alone = Killer(processes, victim, whole, model_folder())
    assert not alone.strike(longest=PATIENCE), "left alone, it ends by itself"
    assert alone.used > 0, "or the others would be killed before they do anything"
    expected = load_file(whole / "variator.safetensors")
    total = runs = 0
    while total < kills:
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        killer = Killer(processes, victim, folder, model_folder())
        killer.random.seed(runs)
        attempt = 0
        while killer.strike(longest=alone.used * (0.7 + 0.1 * attempt)):  # it must end some day
            attempt += 1
        total += killer.kills
        runs += 1
        found = load_file(folder / "variator.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    figures[victim.__name__] = {"kills": total, "runs that ended with the same weights": runs}


def test_as_many_kills_as_asked_for(request, figures):
    asked = request.config.getoption("kills")
    if asked is None:
        pytest.skip("a number is asked for with --kills")
    figures["kills"] = sum(part["kills"] for part in figures.values() if isinstance(part, dict))
    assert figures["kills"] >= asked
