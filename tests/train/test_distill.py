"""Training runs on a tiny decoder: what is learned and saved, and that an interrupted run ends the same."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_decoder, randomise
from safetensors.torch import load_file
from tiny import model_folder, train, words
from transformers import TrainingArguments

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.train.data import Corpus, TrainingStream, collate
from llm_variator.train.judges import ContinuationJudge
from llm_variator.train.learners import PluginLearner
from llm_variator.train.losses import LOSSES
from llm_variator.train.objective import Objective
from llm_variator.train.trainer import VariatorTrainer, checkpoints, examples_in, last_complete_checkpoint

WEIGHTS = "variator.safetensors"


def assert_same_weights(one: Path, other: Path, tolerance: float = 0.0) -> None:
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)


def losses(figures: dict) -> list[float]:
    return [loss for _, loss in figures["loss_history"]]


def make_trainer(model: VariatorModel, folder: Path, loss: str = "mse", **settings) -> VariatorTrainer:
    windows = torch.randint(3, 97, (8, 20), generator=torch.Generator().manual_seed(0)).int()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        **settings,
    )
    corpus = Corpus((windows[:6],), (1.0,), windows[6:])
    learner = PluginLearner(model)
    return VariatorTrainer(
        learner,
        arguments,
        TrainingStream(corpus, length=examples_in(arguments), batch_size=2, prompt_tokens=(8, 14), seed=0),
        collate,
        objective=Objective(learner, loss, kl_weight=0.5, continuation=6),
        judge=ContinuationJudge(corpus.held_out, continuation=6, batch_size=2),
    )


def make_model(dtype: torch.dtype = torch.float32, **settings) -> VariatorModel:
    config = VariatorConfig(**dict(k=2, sites=("ffn", "kv"), r=4, dense_head=1) | settings)
    model = VariatorModel(make_decoder("llama").to(dtype), config)
    randomise(model.plugin(), std=0.1)
    return model


# --- the loss --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_two_separate_passes(tmp_path, loss):
    model = make_model()
    trainer = make_trainer(model, tmp_path, loss)
    batch = next(iter(trainer.get_train_dataloader()))
    assert 8 <= batch["prompt_length"] <= 14
    ours = trainer.compute_loss(model, batch)
    student = model(**batch, output_hidden_states=True)
    teacher = model.base(batch["input_ids"], output_hidden_states=True)  # outside a session: the plain base
    expected = (student.hidden_states[-1] - teacher.hidden_states[-1]).square().mean()
    theirs = teacher.logits[:, -6:].log_softmax(-1)
    kl = (theirs.exp() * (theirs - student.logits[:, -6:].log_softmax(-1))).sum(-1).mean()
    expected = {"mse": expected, "mse+kl": expected + 0.5 * kl, "kl": kl}[loss]
    torch.testing.assert_close(ours, expected)


def test_only_the_plugin_gets_gradients(tmp_path):
    model = make_model()
    trainer = make_trainer(model, tmp_path)
    trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    assert all(parameter.grad is not None for parameter in model.plugin().parameters())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_checkpointing_changes_nothing(tmp_path, loss):
    gradients = []
    for checkpointing in (False, True):
        model = make_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        trainer = make_trainer(model, tmp_path, loss)
        trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).backward()
        gradients.append([parameter.grad for parameter in model.plugin().parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("dtype", "bf16"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)]
)
def test_trained_weights_stay_float32(tmp_path, dtype, bf16):
    model = make_model(dtype)
    before = {name: value.clone() for name, value in model.plugin().state_dict().items()}
    base = {name: value.clone() for name, value in model.base.state_dict().items()}
    make_trainer(model, tmp_path, "mse+kl", bf16=bf16, save_strategy="no").train()
    for name, value in model.plugin().state_dict().items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[name]), name
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, base[name]), name


# --- whole runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A whole short run: its folder and figures."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, train(folder, "--tensorboard")


def test_loss_falls(tmp_path):
    text = tmp_path / "text.jsonl"  # repetitive: a random model has little else that could be learned
    text.write_text(
        json.dumps("the cat sat on the mat. " * 4) + "\n" + (json.dumps("the cat sat. ") + "\n") * 50
    )
    settings = dict(max_steps=80, batch_size=4, save_every=0, r=16, learning_rate=2e-2)
    figures = train(tmp_path / "run", data=text, **settings)
    first, last = losses(figures)[:10], losses(figures)[-10:]
    assert sum(last) < 0.7 * sum(first)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_figures(finished):
    folder, figures = finished
    assert figures["steps"] == 6
    assert [step for step, _ in figures["loss_history"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in figures["held_out_history"]] == [0, 6]
    assert figures["held_out"]["compressed"] == figures["held_out_history"][-1][1]
    assert set(figures["held_out"]) == {"compressed", "dense", "no_context"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pydoc-topics" in card
    assert f"{figures['held_out']['compressed']:.3f}" in card
    assert list((folder / "runs").glob("events.out.tfevents.*"))


def test_checkpoint_holds_plugin_and_optimizer_only(finished):
    checkpoint = finished[0] / "checkpoint-6"
    state = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert {file.name for file in checkpoint.iterdir()} == state | {
        WEIGHTS,
        "variator_config.json",
        "README.md",
    }
    assert sorted(path.name for path in finished[0].glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    model = VariatorModel(make_decoder("llama", vocab_size=259), VariatorConfig(k=2, r=4))
    weights = load_file(checkpoint / WEIGHTS)
    assert weights.keys() == model.plugin().state_dict().keys()
    optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    sizes = sorted(state["exp_avg"].numel() for state in optimizer["state"].values())
    assert sizes == sorted(value.numel() for value in weights.values())


def test_finished_plugin_loads_and_can_be_trained_on(finished, tmp_path):
    folder = finished[0]
    model = VariatorModel.from_pretrained(model_folder(), folder)
    for name, value in load_file(folder / WEIGHTS).items():
        assert torch.equal(model.plugin().state_dict()[name], value)
    none = dict(k=None, r=None, dense_head=None)
    figures = train(tmp_path / "on", plugin=folder, save_dtype="bfloat16", **none)
    assert figures["held_out_history"][0][1] == finished[1]["held_out_history"][-1][1]
    assert figures["config"] == finished[1]["config"]
    assert {value.dtype for value in load_file(tmp_path / "on" / WEIGHTS).values()} == {torch.bfloat16}


# --- interrupted runs ------------------------------------------------------------------------------------


def test_run_killed_at_any_moment_ends_like_the_uninterrupted_one(tmp_path):
    settings = dict(max_steps=60, save_every=4, sites="ffn,kv", schedule="cosine")
    expected = train(tmp_path / "whole", **settings)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "llm_variator.train", *words(killed, **settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint-8").exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)  # while the checkpoint is being written
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "training.json").exists()
    figures = train(killed, "--resume", **settings)
    assert losses(figures)[-1] == pytest.approx(losses(expected)[-1], abs=1e-4)
    assert figures["held_out"] == pytest.approx(expected["held_out"], abs=1e-4)
    assert_same_weights(killed, tmp_path / "whole", tolerance=1e-5)


@pytest.fixture
def half_way(tmp_path) -> tuple[Path, Path, dict]:
    """A whole run with gradient accumulation, a copy of it as it was at step 2, and its settings."""
    settings = dict(grad_accum=3, batch_size=1, save_total_limit=9)
    whole, half = tmp_path / "whole", tmp_path / "half"
    train(whole, **settings)
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    shutil.copy(whole / "run.json", half)
    return whole, half, settings


def test_resume_across_gradient_accumulation_is_exact(half_way):
    whole, half, settings = half_way
    train(half, "--resume", **settings)
    assert_same_weights(half, whole)
    for name in ("loss_history", "held_out_history"):
        read = [
            json.loads((folder / "training.json").read_text())["figures"][name] for folder in (half, whole)
        ]
        assert read[0] == read[1]


def test_resumed_run_saves_as_its_own_flags_say(half_way):
    _, half, settings = half_way
    train(half, "--resume", **settings | dict(save_every=1, logging_every=2))
    assert [path.name for path in checkpoints(half)] == [f"checkpoint-{step}" for step in range(2, 7)]
    log = json.loads((half / "training.json").read_text())["figures"]["loss_history"]
    assert [step for step, _ in log] == [1, 2, 4, 6]


def test_half_written_checkpoint_is_passed_over_and_removed(half_way):
    whole, half, settings = half_way
    for number, damage in enumerate(("trainer_state.json", "optimizer.pt", WEIGHTS)):
        broken = half / f"checkpoint-{4 + number}"
        shutil.copytree(whole / "checkpoint-4", broken)
        if damage == "trainer_state.json":
            (broken / damage).write_text((broken / damage).read_text()[:100])
        else:
            (broken / damage).unlink()
    assert last_complete_checkpoint(half) == half / "checkpoint-2"
    assert [path.name for path in half.glob("checkpoint-*")] == ["checkpoint-2"]
    train(half, "--resume", **settings)
    assert_same_weights(half, whole)


def test_resume_refuses_other_settings(half_way):
    _, half, settings = half_way
    with pytest.raises(VariatorError, match=r"other settings: k was 2, is 4; seed was 0, is 1"):
        train(half, "--resume", **settings | dict(seed=1, k=4))
    assert [path.name for path in half.glob("checkpoint-*")] == ["checkpoint-2"]


def test_flags_younger_than_a_run_count_as_their_defaults(half_way):
    _, half, settings = half_way
    record = half / "run.json"
    before = json.loads(record.read_text())
    del before["recall"]
    record.write_text(json.dumps(before))
    with pytest.raises(VariatorError, match=r"other settings: recall was 0\.0, is 0\.5$"):
        train(half, "--resume", **settings | dict(recall=0.5))
    train(half, "--resume", **settings)


def test_records_of_earlier_versions(half_way):
    """They hold no plugin flag that was not given; what a resumed run may change is never compared."""
    _, half, settings = half_way
    record = half / "run.json"
    before = {name: value for name, value in json.loads(record.read_text()).items() if value is not None}
    assert "sites" not in before
    record.write_text(json.dumps(before | {"config": "recipe.yaml"}))
    with pytest.raises(VariatorError, match=r"other settings: sites was None, is \['kv'\]$"):
        train(half, "--resume", **settings | dict(sites="kv"))
    train(half, "--resume", **settings)


def test_resume_of_a_finished_run_can_go_further(half_way):
    whole, _, settings = half_way
    figures = train(whole, "--resume", **settings | dict(max_steps=8))
    assert figures["steps"] == 8
    assert [step for step, _ in figures["loss_history"]] == list(range(1, 9))
