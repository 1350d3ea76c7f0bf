"""Two processes on a CPU (gloo), by DDP and by FSDP2, against one process with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import train, words

from llm_variator import VariatorError
from llm_variator.train.distributed import average_gradients

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SETTINGS = dict(sites="ffn,kv", learning_rate=0.003, max_steps=6, save_every=3, eval_every=3, batch_size=2)


def launch(folder: Path, runs: list[tuple[list[str], bool]]) -> None:
    """Each run in two processes; (command line, with FSDP)."""
    file = folder / "runs.json"
    file.write_text(json.dumps([{"words": words, "fsdp": fsdp} for words, fsdp in runs]))
    script = Path(__file__).with_name("distributed_runs.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            script,
            file,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs: alone, ddp, fsdp; and of runs whose second half had another number of processes."""
    folder = tmp_path_factory.mktemp("runs")
    half = {**SETTINGS, "max_steps": 3, "schedule": "constant"}
    rest = {**half, "max_steps": 6}
    train(folder / "alone", **SETTINGS, grad_accum=2)
    train(folder / "constant", **rest, grad_accum=2)
    train(folder / "one-then-fsdp", **half, grad_accum=2)
    launch(
        folder,
        [
            (words(folder / "ddp", **SETTINGS), False),
            (words(folder / "ddp-then-one", **half), False),
            (words(folder / "fsdp", **SETTINGS), True),
            (words(folder / "one-then-fsdp", "--resume", **rest), True),
        ],
    )
    train(folder / "ddp-then-one", "--resume", **rest, grad_accum=2)
    return folder


def figures(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())["figures"]


def losses(folder: Path) -> list[float]:
    return [loss for _, loss in figures(folder)["loss_history"]]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_with_twice_the_micro_batches(runs, kind):
    alone, ours = figures(runs / "alone"), figures(runs / kind)
    assert (alone["processes"], ours["processes"]) == (1, 2)
    assert losses(runs / kind) == pytest.approx(losses(runs / "alone"), abs=1e-4)
    assert len(set(losses(runs / "alone"))) == 6, "a loss that changes"
    assert ours["held_out"] == pytest.approx(alone["held_out"], abs=1e-4)
    expected = load_file(runs / "alone" / "variator.safetensors")
    found = load_file(runs / kind / "variator.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["ddp-then-one", "one-then-fsdp"])
def test_a_run_goes_on_with_another_number_of_processes(runs, kind):
    whole = losses(runs / "constant")
    resumed = losses(runs / kind)
    assert len(resumed) == 6
    assert resumed == pytest.approx(whole, abs=1e-4)
    expected = load_file(runs / "constant" / "variator.safetensors")
    for name, value in load_file(runs / kind / "variator.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["alone", "ddp", "fsdp"])
def test_checkpoints_hold_the_plugin_and_its_optimizer_alone(runs, kind):
    checkpoint = runs / kind / "checkpoint-6"
    plugin = load_file(checkpoint / "variator.safetensors")
    count = sum(value.numel() for value in plugin.values())
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    moments = [entry[name].numel() for entry in state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(moments) == 2 * count
    kept = {path.name for path in checkpoint.iterdir() if not path.name.startswith("rng_state")}
    plugin_files = {"README.md", "variator.safetensors", "variator_config.json"}
    assert kept == plugin_files | {"optimizer.pt", "scheduler.pt", "trainer_state.json"}


def test_another_global_batch_cannot_be_resumed(runs):
    with pytest.raises(VariatorError, match="have 2 micro-batches, here they would have 3"):
        train(runs / "ddp", "--resume", **{**SETTINGS, "max_steps": 8}, grad_accum=3)


def test_a_weight_without_gradient_counts_as_zero(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        used, unused, frozen = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
        frozen.requires_grad_(False)
        used.grad = torch.tensor([1.0, 2.0])
        average_gradients([used, unused, frozen])
    finally:
        torch.distributed.destroy_process_group()
    assert used.grad.tolist() == [1, 2]
    assert unused.grad.tolist() == [0, 0]
    assert frozen.grad is None
