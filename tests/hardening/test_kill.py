"""Processes that save, train and resume are killed at random moments: nothing is lost, nothing is corrupt."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
import victims
from safetensors.torch import load_file
from tiny import model_folder

from llm_variator.contexts import CompressedContext

PATIENCE = 900  # seconds until a process has begun: machines may be busy


@pytest.fixture(scope="module")
def processes():
    """Processes fork off one that has imported everything, and no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["victims"])
    return context


class Killer:
    """Starts a victim and kills it at a random moment after it began its work."""

    def __init__(self, processes, victim, *args) -> None:
        self.processes, self.victim, self.args = processes, victim, args
        self.random = random.Random(0)
        self.done = processes.Value("q", 0)
        self.kills = 0

    def strike(self, longest: float) -> bool:
        """One process; False if it had finished before it was killed."""
        started = self.processes.Event()
        process = self.processes.Process(
            target=self.victim, args=(*self.args, started, self.done), daemon=True
        )
        process.start()
        begun = time.monotonic()
        while not started.wait(0.2):
            assert process.exitcode is None, "the victim died by itself"
            assert time.monotonic() - begun < PATIENCE
        process.join(self.random.uniform(0, longest))
        finished = process.exitcode is not None
        if finished:
            assert process.exitcode == 0, "the victim died by itself"
        else:
            process.kill()
            self.kills += 1
        process.join()
        return not finished


def left_over(folder: Path) -> list[str]:
    """Temporary files in a folder."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_saving_a_plugin(request, figures, processes, tmp_path):
    kills = (request.config.getoption("kills") or 8) // 4
    folder = tmp_path / "plugin"
    killer = Killer(processes, victims.saves, folder)
    own = victims.model()
    while killer.kills < kills:
        assert killer.strike(longest=0.2)
        saved = load_file(folder / "variator.safetensors")
        numbers = {float(number) for value in saved.values() for number in value.unique()}
        assert numbers in ({killer.done.value}, {killer.done.value + 1}), (
            "the last save that ended, or a later one"
        )
        own.load_plugin(folder, "again")
        own.delete_plugin("again")
    figures["plugin"] = {
        "kills": killer.kills,
        "saves": killer.done.value,
        "left over": len(left_over(folder)),
    }


def test_saving_a_context(request, figures, processes, tmp_path):
    kills = (request.config.getoption("kills") or 8) // 4
    file = tmp_path / "context.safetensors"
    killer = Killer(processes, victims.saves_contexts, file)
    own = victims.model()
    while killer.kills < kills:
        assert killer.strike(longest=0.2)
        context = CompressedContext.load(file, own)
        assert context.input_ids.shape[1] in (100 + (killer.done.value + more) % 300 for more in (0, 1))
        own.generate([[5, 6]], context=context, max_new_tokens=1)
    figures["context"] = {"kills": killer.kills, "saves": killer.done.value}


def test_training_and_resuming(request, figures, processes, tmp_path):
    """However often it is killed, a run ends with the very weights of one that was left alone."""
    kills = (request.config.getoption("kills") or 8) // 2
    whole = tmp_path / "whole"
    alone = Killer(processes, victims.trains, whole, model_folder())
    began = time.monotonic()
    assert not alone.strike(longest=PATIENCE), "left alone, it ends by itself"
    takes = time.monotonic() - began
    expected = load_file(whole / "variator.safetensors")
    total = runs = 0
    while total < kills:
        folder = tmp_path / f"run-{runs}"
        folder.mkdir()
        killer = Killer(processes, victims.trains, folder, model_folder())
        killer.random.seed(runs)
        # the longer it has been going on, the more time it gets: the run must end some day
        attempt = 0
        while killer.strike(longest=takes * (0.6 + 0.1 * attempt)):
            attempt += 1
        total += killer.kills
        runs += 1
        found = load_file(folder / "variator.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    figures["training"] = {"kills": total, "runs that ended with the same weights": runs}
    figures["kills"] = sum(part["kills"] for part in figures.values() if isinstance(part, dict))
